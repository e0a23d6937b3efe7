"""Readers of annotations: text with times, events, and the public sets of cholecystectomies, as segments."""

from .formats import FORMS, read_annotations

__all__ = ["FORMS", "read_annotations"]
