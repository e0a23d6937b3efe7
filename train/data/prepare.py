"""Clips to shards: cut into windows, encode, label, and say what was kept and what was not.

Letters: F, H, W frames, height, width in pixels; f, h, w the same of the latent.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import file_sha256
from ...moe_lora.instruments import ExpertSet
from ...moe_lora.video import Fit, VideoEndError, VideoInfo, iter_windows, to_model, video_info
from ...moe_lora.wan.codec import Codec, image_condition
from ...moe_lora.wan.text import TextEncoder, encode_prompts
from .clips import Clip, Window, windows
from .region import latent_region, read_masks, window_tips
from .shard_writer import ShardWriter
from .shards import histogram_lines
from .splits import assign_splits

Instruments = tuple[tuple[str, float], ...]


class Piece(NamedTuple):
    """One window of one clip, to become one sample."""

    clip: Clip
    instruments: Instruments
    window: Window


@dataclass
class Plan:
    """What will be encoded, in the order of the shards, and what was left out."""

    pieces: list[Piece] = field(default_factory=list)
    infos: dict[Path, VideoInfo] = field(default_factory=dict)
    digests: dict[Path, str] = field(default_factory=dict)
    """SHA-256 of each video file."""
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Where the first clip was read that was dropped for a reason."""
    notes: list[str] = field(default_factory=list)

    def drop(self, clip: Clip, reason: str, count: int = 1) -> None:
        """Count what is left out."""
        self.dropped[reason] += count
        self.examples.setdefault(reason, clip.origin)


def prepare(
    clips: Sequence[Clip],
    out: str | Path,
    *,
    codec: Codec,
    text_encoder: TextEncoder,
    experts: ExpertSet,
    size: tuple[int, int],
    frames: int,
    fps: float | None = None,
    window_stride: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    task: str = "t2v",
    batch_size: int = 4,
    progress: bool = True,
) -> dict[str, Any]:
    """Encode clips into a folder of shards; returns its manifest, with the histogram per split and
    instrument.

    Every window of `frames` (4 n + 1) at `fps` (None: the file's own rate) is scaled to cover `size` (H, W,
    multiples of 16) and cut in the centre; tips, boxes and masks follow. `task` "i2v" also stores the
    condition on the first frame. Instruments come from the clip's labels, else a `[Tools in: ...]` of its
    caption, else the caption's keywords. With `progress` a bar and a summary go to standard error. Raises
    `WanmoeError` on unreadable videos, unknown instruments, sizes that cannot be and where nothing is left;
    `out` then stays as it was.
    """
    _check(size, frames, task, batch_size)
    plan = make_plan(
        clips,
        experts,
        frames=frames,
        fps=fps,
        window_stride=window_stride,
        val_fraction=val_fraction,
        seed=seed,
    )
    (null_context,) = encode_prompts(text_encoder, [""])
    writer = ShardWriter(out, describe(codec), describe(text_encoder), null_context=null_context)
    with writer, tqdm(total=len(plan.pieces), unit="clip", desc="prepare", disable=not progress) as bar:
        encode = _Encoder(codec, text_encoder, writer, plan, size, frames, fps, task)
        pieces = _read(plan, size)
        while batch := list(islice(pieces, batch_size)):
            encode(batch)
            bar.update(len(batch))
        writer.settings = {
            "task": task,
            "size": list(size),
            "frames": frames,
            "fps": fps,
            "seed": seed,
            "experts": list(experts.names),
            "dropped": dict(sorted(plan.dropped.items())),
            "notes": plan.notes,
        }
    if progress:
        print("\n".join(summary(writer.manifest, plan)), file=sys.stderr)
    return writer.manifest


def make_plan(
    clips: Sequence[Clip],
    experts: ExpertSet,
    *,
    frames: int,
    fps: float | None,
    window_stride: int | None,
    val_fraction: float,
    seed: int,
) -> Plan:
    """Read the heads of all videos, label and split the clips, and cut them into windows; encodes nothing."""
    plan = Plan()
    for clip in clips:
        if clip.video_path not in plan.infos:
            try:
                plan.infos[clip.video_path] = video_info(clip.video_path)
            except WanmoeError as error:
                named = clip.origin == str(clip.video_path)
                raise WanmoeError(str(error) if named else f"{clip.origin}: {error}") from error
            plan.digests[clip.video_path] = file_sha256(clip.video_path)
    labels = [label(clip, experts) for clip in clips]
    by_origin = {(clip.origin, clip.video_path): own for clip, own in zip(clips, labels, strict=True)}
    names = [[name for name, _ in own] for own in labels]
    split, plan.notes = assign_splits(
        clips, names, plan.infos, val_fraction=val_fraction, frames=frames, fps=fps, seed=seed
    )
    trained: dict[str, set[int]] = {}
    for clip in sorted(split, key=lambda clip: clip.split != "train"):  # training first: it claims its frames
        cut = windows(clip, plan.infos[clip.video_path], frames=frames, fps=fps, stride=window_stride)
        if not cut:
            plan.drop(
                clip, f"clip shorter than {frames} frames at {f'{fps:g} fps' if fps else 'its own rate'}"
            )
        claimed = trained.setdefault(plan.digests[clip.video_path], set())
        for window in cut:
            span = range(window.indices[0], window.indices[-1] + 1)
            if clip.split == "train":
                claimed.update(span)
            elif not claimed.isdisjoint(span):
                plan.drop(clip, "held-out window shares frames with training")
                continue
            plan.pieces.append(Piece(clip, by_origin[clip.origin, clip.video_path], window))
    if not plan.pieces:
        causes = "; ".join(f"{count} x {reason}" for reason, count in plan.dropped.items())
        raise WanmoeError(f"no sample is left of {len(clips)} clips: {causes}; lower frames or fps")
    files = {path: number for number, path in enumerate(plan.infos)}
    plan.pieces.sort(key=lambda piece: (files[piece.clip.video_path], piece.window.indices[0]))
    return plan


def label(clip: Clip, experts: ExpertSet) -> Instruments:
    """The instruments of a clip as names of `experts` with weights that sum to 1; () is no evidence.

    Raises `WanmoeError` that names the line where a label is not in the set.
    """
    if clip.instruments is not None:
        weights: dict[str, float] = {}
        for given, weight in clip.instruments:
            try:
                members = experts.weights(given)
            except WanmoeError as error:
                raise WanmoeError(
                    f"{clip.origin}: {error}; your own experts are given by --experts CONFIG"
                ) from error
            for name, part in members.items():
                weights[name] = weights.get(name, 0.0) + weight * part
        return tuple(weights.items())
    if clip.instrument_label is not None:
        if clip.instrument_label >= len(experts.names):
            raise WanmoeError(
                f"{clip.origin}: instrument_label is {clip.instrument_label}, "
                f"but the experts, counted from 0, are: {', '.join(experts.names)}"
            )
        return ((experts.names[clip.instrument_label], 1.0),)
    hits = experts.find(clip.tools) or experts.find(clip.caption) or experts.find(clip.caption_zh or "")
    total = sum(hits.values())
    return tuple((name, hits[name] / total) for name in experts.names if name in hits)


def describe(encoder: Codec | TextEncoder) -> dict[str, Any]:
    """What the manifest says of a codec or text encoder."""
    return {"name": encoder.name, "fingerprint": encoder.fingerprint, "stand_in": encoder.stand_in}


def summary(manifest: Mapping[str, Any], plan: Plan) -> list[str]:
    """What was kept, what was dropped and why, and how the instruments are spread, as lines of text."""
    kept = ", ".join(f"{count} {split}" for split, count in manifest["n_samples"].items())
    lines = [f"kept {kept} samples in {len(manifest['shards'])} shards"]
    for reason, count in sorted(plan.dropped.items()):
        lines.append(f"dropped {count}: {reason} (first: {plan.examples[reason]})")
    stand_ins = [manifest[part]["name"] for part in ("codec", "text_encoder") if manifest[part]["stand_in"]]
    if stand_ins:
        lines.append(f"stand-ins, not the real models: {', '.join(stand_ins)}")
    return [*lines, *(f"note: {note}" for note in plan.notes), *histogram_lines(manifest["histogram"])]


class _Encoder:
    """Encodes batches of windows and hands them to the writer."""

    def __init__(
        self,
        codec: Codec,
        text_encoder: TextEncoder,
        writer: ShardWriter,
        plan: Plan,
        size: tuple[int, int],
        frames: int,
        fps: float | None,
        task: str,
    ) -> None:
        self.codec, self.text_encoder, self.writer, self.plan = codec, text_encoder, writer, plan
        self.size, self.frames, self.fps, self.task = size, frames, fps, task
        self._contexts: dict[str, Tensor] = {}
        self._masks: tuple[str, NDArray[np.uint8] | None] = ("", None)

    @torch.no_grad()
    def __call__(self, batch: Sequence[tuple[Piece, Tensor]]) -> None:
        videos = torch.stack([to_model(pictures) for _, pictures in batch])
        latents = self.codec.encode(videos).cpu()
        self._embed([piece.clip.caption for piece, _ in batch])
        for (piece, _), video, latent in zip(batch, videos, latents, strict=True):
            image = image_condition(self.codec, video[:, 0], self.frames)[0] if self.task == "i2v" else None
            self._write(piece, latent, image)

    def _embed(self, captions: Sequence[str]) -> None:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._contexts]
        if len(self._contexts) > 1000:  # a real embedding has megabytes: keep what this batch needs
            self._contexts = {caption: self._contexts[caption] for caption in captions if caption not in new}
        if new:
            # Off the encoder's device at once: what is kept here would fill its memory.
            contexts = (context.cpu() for context in encode_prompts(self.text_encoder, new))
            self._contexts.update(zip(new, contexts, strict=True))

    def _write(self, piece: Piece, latent: Tensor, image: Tensor | None) -> None:
        clip, instruments, window = piece
        info, digest = self.plan.infos[clip.video_path], self.plan.digests[clip.video_path]
        key = _key(clip, window, digest, self.size)
        if key in self.writer:
            self.plan.drop(clip, "the same window and caption twice")
            return
        fit = Fit.cover((info.height, info.width), self.size)
        roi = latent_region(clip, window.indices, fit, self._mask(clip, window, info))
        tips = window_tips(clip, window.indices, fit)
        meta = {
            "caption": clip.caption,
            "caption_zh": clip.caption_zh,
            "instruments": [{"name": name, "weight": weight} for name, weight in instruments],
            "fps": self.fps or info.fps,
            "n_frames": self.frames,
            "size": list(self.size),
            "source": clip.source,
            "source_sha256": digest,
            "source_frames": [window.indices[0], window.indices[-1]],
            "tips": tips,
        }
        self.writer.add(
            key,
            clip.split or "train",
            latent,
            self._contexts[clip.caption],
            meta,
            roi=roi,
            image_latent=image,
        )

    def _mask(self, clip: Clip, window: Window, info: VideoInfo) -> NDArray[np.uint8] | None:
        """The clip's masks; those of the last clip are kept, since its windows follow one another."""
        if self._masks[0] != clip.origin:
            self._masks = (clip.origin, read_masks(clip, info.height, info.width))
        masks, needed = self._masks[1], window.indices[-1] + 1 - clip.masks_from
        if masks is not None and len(masks) < needed:
            raise WanmoeError(
                f"{clip.origin}: there are {len(masks)} masks, but {needed} frames are used: {clip.masks}"
            )
        return masks


def _read(plan: Plan, size: tuple[int, int]) -> Iterator[tuple[Piece, Tensor]]:
    """The pictures of every piece, each video decoded once."""
    for path, group in groupby(plan.pieces, key=lambda piece: piece.clip.video_path):
        pieces = list(group)
        done = 0
        try:
            for pictures in iter_windows(path, [piece.window.indices for piece in pieces], size):
                yield pieces[done], pictures
                done += 1
        except VideoEndError:  # some containers say more frames than they hold
            plan.drop(pieces[done].clip, "the video ends before the window does", len(pieces) - done)


def _key(clip: Clip, window: Window, digest: str, size: tuple[int, int]) -> str:
    """Unique by content: equal names in two folders differ in the hash of what they hold."""
    content = repr((digest, window.indices, size, clip.caption)).encode()
    source, name = (re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[-24:] for text in (clip.source, clip.id))
    return (
        f"{source or 'video'}_{name or 'clip'}-w{window.number:03d}_{hashlib.sha256(content).hexdigest()[:8]}"
    )


def _check(size: tuple[int, int], frames: int, task: str, batch_size: int) -> None:
    if any(side < 16 or side % 16 for side in size):
        raise WanmoeError(f"size is {size[0]} x {size[1]}; height and width are multiples of 16")
    if frames < 1 or frames % 4 != 1:
        raise WanmoeError(f"frames is {frames}, but a clip of the model has 4 n + 1 frames (17, 33, 81, ...)")
    if task not in ("t2v", "i2v"):
        raise WanmoeError(f'task is "t2v" or "i2v", got {task!r}')
    if batch_size < 1:
        raise WanmoeError(f"batch_size must be 1 or more, got {batch_size}")
