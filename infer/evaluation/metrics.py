"""Every figure by its key: what it is called, in what unit, which way is better, and what it says."""

from __future__ import annotations

from typing import Literal, NamedTuple

Better = Literal["higher", "lower", "neither"]


class Metric(NamedTuple):
    """A figure of a clip, or of a set of them."""

    title: str
    unit: str
    better: Better
    group: str
    meaning: str


PLACE, IDENTITY, STEADY, REPEAT, ROUTER, SETS = (
    "Place of the instrument",
    "Identity",
    "Steadiness",
    "Against the true clip, frame by frame",
    "Router",
    "Sets of clips",
)

METRICS: dict[str, Metric] = {
    **{
        f"tip_pck@{radius}px": Metric(
            f"tip PCK@{radius}px",
            "share",
            "higher",
            PLACE,
            f"true tips with a found one within {radius} pixels",
        )
        for radius in (5, 10, 20)
    },
    "tip_pck@0.05diag": Metric(
        "tip PCK@0.05 diagonal",
        "share",
        "higher",
        PLACE,
        "true tips with a found one within 5 % of the picture's diagonal",
    ),
    "tip_iou": Metric(
        "tip IoU",
        "",
        "higher",
        PLACE,
        "overlap of squares about found and true tip, a sixth of the picture's shorter side",
    ),
    "tip_extra": Metric(
        "extra tips", "to one true tip", "lower", PLACE, "found tips that match none of the true ones"
    ),
    "box_iou": Metric("box IoU", "", "higher", PLACE, "overlap of given boxes; 0 for a missed one"),
    "mask_iou": Metric("mask IoU", "", "higher", PLACE, "overlap of given masks; 0 for a missed one"),
    "identity": Metric(
        "identity", "share", "higher", IDENTITY, "clips that the classifier takes for what their label says"
    ),
    "flips": Metric(
        "flips",
        "per second",
        "lower",
        IDENTITY,
        "how often the instrument that the classifier sees changes from moment to moment",
    ),
    "flips_ema": Metric(
        "flips after EMA",
        "per second",
        "lower",
        IDENTITY,
        "the same of its judgement averaged over time, as the gates of a schedule are",
    ),
    "warped_psnr": Metric(
        "warped PSNR",
        "dB",
        "higher",
        STEADY,
        "each frame against the one before it carried along by the clip's own motion, in the region",
    ),
    "warped_ssim": Metric("warped SSIM", "", "higher", STEADY, "the same, by structure"),
    "warped_lpips": Metric("warped LPIPS", "", "lower", STEADY, "the same, by LPIPS"),
    "fds": Metric(
        "FDS",
        "",
        "lower",
        REPEAT,
        "mean absolute difference, of 2 at most, but frame 0",
    ),
    "fds_early": Metric("FDS, first sixth", "", "lower", REPEAT, "the same of the first sixth of the frames"),
    "fds_mid": Metric("FDS, next third", "", "lower", REPEAT, "the same of the third after it"),
    "fds_late": Metric("FDS, second half", "", "lower", REPEAT, "the same of the second half"),
    "frame_ssim": Metric("SSIM", "", "higher", REPEAT, "mean structural similarity, but frame 0"),
    "gatc": Metric(
        "GATC",
        "",
        "higher",
        REPEAT,
        "correlation inside the true instrument masks, times the share of its edges that are there",
    ),
    "tcd": Metric("TCD", "px", "lower", REPEAT, "distance of the instruments' centroids"),
    "router_agreement": Metric(
        "top-1 agreement", "share", "higher", ROUTER, "captions whose strongest expert is that of the label"
    ),
    "router_entropy": Metric(
        "gate entropy", "of log E", "neither", ROUTER, "0: one expert alone, 1: all experts alike"
    ),
    "router_flips": Metric(
        "flips of the router",
        "per second",
        "lower",
        ROUTER,
        "how often the strongest expert changes when the router reads each moment of the clip",
    ),
    "router_flips_ema": Metric(
        "flips of the router after EMA",
        "per second",
        "lower",
        ROUTER,
        "the same of its gates averaged over time, as those of a schedule are",
    ),
}


def direction(key: str) -> Better:
    """Which way a figure is better; load and the like are neither."""
    return METRICS[key].better if key in METRICS else "neither"
