"""Which clips are held out: videos where there are several of a kind, else moments of the only one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...moe_lora.errors import WanmoeError
from ...moe_lora.video import VideoInfo
from .clips import Clip, window_span


def assign_splits(
    clips: Sequence[Clip],
    labels: Sequence[Sequence[str]],
    infos: Mapping[Path, VideoInfo],
    *,
    val_fraction: float,
    frames: int,
    fps: float | None,
    seed: int,
) -> tuple[list[Clip], list[str]]:
    """Give every clip without a `split` one; returns the clips, some cut in two, and notes for the user.

    Held out is about `val_fraction` of the sources of every label that has several. A label with a single
    source is cut in time, head for training and tail for validation, where both hold a window of `frames` at
    `fps`. `labels` are the instruments of each clip. Clips that name their split keep it, and where any is
    "val" nothing more is held out.
    """
    if not 0 <= val_fraction < 1:
        raise WanmoeError(f"val_fraction is {val_fraction}; it lies in [0, 1)")
    if val_fraction == 0 or any(clip.split == "val" for clip in clips):
        return [clip if clip.split else replace(clip, split="train") for clip in clips], []
    sources: dict[str, set[str]] = {}
    for clip, names in zip(clips, labels, strict=True):
        for name in names or ("(no evidence)",):
            sources.setdefault(name, set()).add(clip.source)
    fixed = {clip.source for clip in clips if clip.split}
    held_out = _held_out(sources, fixed, val_fraction, seed)
    lonely = {label for label, own in sources.items() if not own & held_out}
    done: list[Clip] = []
    moments: set[str] = set()
    for clip, names in zip(clips, labels, strict=True):
        own = set(names or ("(no evidence)",))
        if clip.split:
            done.append(clip)
        elif clip.source in held_out:
            done.append(replace(clip, split="val"))
        elif own <= lonely and (halves := _cut(clip, infos[clip.video_path], val_fraction, frames, fps)):
            done += halves
            moments |= own
        else:
            done.append(replace(clip, split="train"))
    notes = []
    if moments:
        notes.append(f"held-out moments, not held-out videos, for {len(moments)} labels: {_some(moments)}")
    if without := lonely - moments:
        notes.append(
            f"nothing is held out for {len(without)} labels (one video, too short): {_some(without)}"
        )
    return done, notes


def _held_out(sources: Mapping[str, set[str]], fixed: set[str], fraction: float, seed: int) -> set[str]:
    """Sources to hold out, so that every label keeps at least one for training."""
    rng = np.random.default_rng(seed)
    held: set[str] = set()
    for label in sorted(sources, key=lambda name: (len(sources[name]), name)):
        own = sorted(sources[label])
        wanted = max(1, round(fraction * len(own)))
        for place in rng.permutation(len(own)):
            source = own[int(place)]
            keeps = all(len(other - held) > 1 for other in sources.values() if source in other)
            if len(held & sources[label]) < wanted and keeps and source not in held | fixed:
                held.add(source)
    return held


def _cut(clip: Clip, info: VideoInfo, fraction: float, frames: int, fps: float | None) -> list[Clip]:
    """Head and tail of a clip; [] where one of them would not hold a window, or the clip is one already."""
    if clip.frames is not None:
        return []
    span = window_span(info, frames, fps)
    length = min(info.frames - clip.start_frame, clip.num_frames or info.frames)
    tail = max(span, math.floor(fraction * length))
    if length - tail < span:
        return []
    start = clip.start_frame + length - tail
    head = replace(clip, split="train", num_frames=length - tail)
    return [head, replace(clip, split="val", start_frame=start, num_frames=tail, id=f"{clip.id}-tail")]


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
