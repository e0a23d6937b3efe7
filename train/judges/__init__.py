"""Small nets that are trained here and then judge a clip: which instrument it shows, and where its tip is."""

from .judge import Classifier, Detector, load_classifier, load_detector, save_judge
from .measures import accuracy, confusion, pad_tips, pck, tip_errors, true_tips
from .training import Recipe, train_classifier, train_detector

__all__ = [
    "Classifier",
    "Detector",
    "Recipe",
    "accuracy",
    "confusion",
    "load_classifier",
    "load_detector",
    "pad_tips",
    "pck",
    "save_judge",
    "tip_errors",
    "train_classifier",
    "train_detector",
    "true_tips",
]
