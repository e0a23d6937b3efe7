"""Caches of musubi-tuner to shards, without encoding anything again: the latents and texts stay bit for bit.

A cache is a pair of safetensors files: `<stem>_<first frame>-<frames>_<W>x<H>_wan.safetensors` with
`latents_{F}x{H}x{W}_{dtype}` [16, F, H, W], normalised, and for i2v `latents_image_...` [20, F, H, W]; and
`<stem>_wan_te.safetensors` with `varlen_t5_{dtype}` [n, D] and the caption, `caption1`. The size in the name
is that of the video before it was scaled, not that of the latent.

Letters: F, H, W latent frames, height, width; n tokens of the caption; D width of the text encoder.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ...moe_lora.errors import WanmoeError
from ...moe_lora.instruments import ExpertSet
from ...moe_lora.video import VideoInfo
from ...moe_lora.wan.codec import CHANNELS, SPACE_STRIDE, TIME_STRIDE, Codec
from ...moe_lora.wan.text import TextEncoder
from .captions import tools_of
from .clips import Clip
from .encode import encode_caption, narrow
from .plan import Plan, label, sample_key, summary
from .prepare import BAR
from .shard_writer import ShardWriter
from .sources import clip_source, recording
from .splits import assign_splits
from .spool import tensors_sha256

FPS = 16.0  # what musubi-tuner resamples videos to for Wan
_NAME = re.compile(r"(?P<stem>.+)_(?P<first>\d+)-(?P<frames>\d+)_(?P<width>\d+)x(?P<height>\d+)_wan")
_LATENT, _IMAGE = (re.compile(rf"{kind}_(\d+)x(\d+)x(\d+)_(\w+)") for kind in ("latents", "latents_image"))
_TEXT = re.compile(r"varlen_t5_(\w+)")
_IMAGE_CHANNELS = 4 + CHANNELS


@dataclass(frozen=True)
class Cache:
    """One pair of files, as their names and headers say."""

    path: Path
    text_path: Path
    name: str
    """Of the file, within the folder."""
    stem: str
    """Of the video file."""
    first: int
    frames: int
    video_size: tuple[int, int]
    """(H, W) in pixels, before scaling."""
    latent: str
    """Name of the tensor."""
    image: str | None
    context: str
    width: int
    """Of the text encoder."""
    caption: str


def import_caches(
    folder: str | Path,
    out: str | Path,
    *,
    experts: ExpertSet,
    clips: Sequence[Clip] = (),
    text_encoder: TextEncoder | None = None,
    codec: Codec | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the caches of a folder and its subfolders as shards; returns the manifest.

    Labels come from `clips`, matched by the stem of the video file, else from the caption. `text_encoder`
    encodes the empty caption alone, which training without captions needs; its fingerprint and that of
    `codec` are recorded. Caches of other models and of single images are dropped and counted. fp16 and bf16
    stay bit for bit; fp32 is stored as fp16. Raises `WanmoeError` that names every file that is wrong; `out`
    then stays as it was.
    """
    folder = Path(folder)
    plan, faults = Plan(), list[str]()
    caches = _find(folder, plan, faults)
    if text_encoder is not None and text_encoder.dim != caches[0].width:
        raise WanmoeError(
            f"--text: its embeddings are {text_encoder.dim} wide, those of the caches {caches[0].width}; "
            "give the encoder that made them"
        )
    listed = _by_stem(clips, experts)
    known = [_clip(cache, listed.get(cache.stem)) for cache in caches]
    plan.notes += _notes(caches, listed)
    labels = [label(clip, experts) for clip in known]
    split, notes = _split(known, labels, caches, val_fraction, seed)
    plan.notes += notes
    writer = ShardWriter(
        out,
        _made_by("wan2.1 (musubi cache)", codec),
        _made_by("umt5 (musubi cache)", text_encoder),
        null_context=None if text_encoder is None else encode_caption(text_encoder, ""),
    )
    samples = list(zip(caches, split, labels, strict=True))
    keys: dict[str, tuple[str, Path]] = {}
    bar = tqdm(samples, desc="import", unit=" samples", bar_format=BAR, disable=not progress)
    with writer:
        for cache, clip, instruments in bar:
            try:
                _add(writer, plan, cache, clip, instruments, keys)
            except CacheError as error:
                faults.append(str(error))
        if faults:
            raise WanmoeError(f"{len(faults)} caches cannot be used: {'; '.join(faults)}")
        writer.settings = {
            "task": "i2v" if caches[0].image else "t2v",
            "frames": sorted({cache.frames for cache in caches}, reverse=True),
            "fps": FPS,
            "seed": seed,
            "experts": list(experts.names),
            "dropped": dict(sorted(plan.dropped.items())),
            "notes": plan.notes,
        }
    if progress:
        for line in summary(writer.manifest, plan):
            tqdm.write(line, file=sys.stderr)
    return writer.manifest


class CacheError(WanmoeError):
    """A pair of files that is not what musubi-tuner writes."""


def _find(folder: Path, plan: Plan, faults: list[str]) -> list[Cache]:
    """The caches below a folder, sorted by name; what is wrong goes to `faults`."""
    if not folder.is_dir():
        raise WanmoeError(f"{folder}: no such folder of caches")
    caches: list[Cache] = []
    for path in sorted(folder.rglob("*.safetensors"), key=lambda path: path.relative_to(folder).as_posix()):
        match = _NAME.fullmatch(path.stem)
        if path.stem.endswith("_te"):
            continue
        if match is None:
            image = path.stem.endswith("_wan")
            plan.drop(str(path), "a cache of a single image" if image else "a cache of another model")
        elif int(match["frames"]) == 1:
            plan.drop(str(path), "a cache of a single image")
        else:
            try:
                caches.append(_read_heads(path, path.relative_to(folder).as_posix(), match))
            except CacheError as error:
                faults.append(str(error))
    i2v = any(cache.image for cache in caches)
    for cache in caches:
        if i2v and cache.image is None:
            faults.append(f"{cache.path}: has no latents_image, as others have")
        elif cache.width != caches[0].width:
            faults.append(f"{cache.text_path}: the text is {cache.width} wide, {caches[0].width} in others")
    caches = [cache for cache in caches if cache.width == caches[0].width and bool(cache.image) == i2v]
    if not caches:
        causes = [*faults, *(f"{count} x {reason}" for reason, count in plan.dropped.items())]
        raise WanmoeError(
            f"{folder}: no cache of a Wan video that can be used: "
            f"{'; '.join(causes) or 'no .safetensors file'}; they are made by wan_cache_latents.py and "
            "wan_cache_text_encoder_outputs.py"
        )
    return caches


def _read_heads(path: Path, name: str, match: re.Match[str]) -> Cache:
    """What the headers of a pair of files say, checked against each other and the name."""
    text_path = path.with_name(f"{match['stem']}_wan_te.safetensors")
    if not text_path.is_file():
        raise CacheError(f"{path}: its text {text_path.name} is missing")
    shapes, _ = _header(path)
    texts, about = _header(text_path)
    frames = int(match["frames"])
    latent, shape = _only(path, shapes, _LATENT)
    wanted = (CHANNELS, (frames - 1) // TIME_STRIDE + 1, *shape[2:])
    if frames % TIME_STRIDE != 1 or len(shape) != 4 or shape != wanted:
        raise CacheError(f"{path}: {latent} is {list(shape)}, which is not {frames} frames, as its name says")
    image = next((key for key in shapes if _IMAGE.fullmatch(key)), None)
    if image is not None and shapes[image][0] != (_IMAGE_CHANNELS, *shape[1:]):
        raise CacheError(f"{path}: {image} is {list(shapes[image][0])}, not {[_IMAGE_CHANNELS, *shape[1:]]}")
    for key in filter(None, (latent, image)):
        said = key.removeprefix("latents_").removeprefix("image_")
        size, dtype = said.split("_", 1)
        if size != "x".join(map(str, shape[1:])) or dtype != shapes[key][1]:
            raise CacheError(f"{path}: {key} is {list(shapes[key][0])} {shapes[key][1]}, unlike its name")
    context, rows = _only(text_path, texts, _TEXT)
    if len(rows) != 2 or 0 in rows:
        raise CacheError(f"{text_path}: {context} is {list(rows)}, not [tokens, width]")
    if not about.get("caption1"):
        raise CacheError(f"{text_path}: its metadata have no caption1")
    return Cache(
        path=path,
        text_path=text_path,
        name=name,
        stem=match["stem"],
        first=int(match["first"]),
        frames=frames,
        video_size=(int(match["height"]), int(match["width"])),
        latent=latent,
        image=image,
        context=context,
        width=rows[1],
        caption=about["caption1"],
    )


Shapes = dict[str, tuple[tuple[int, ...], str]]


def _header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """(shape, dtype) of every tensor of a file, and its metadata."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: (tuple(one.get_shape()), _DTYPES[one.get_dtype()]) for key, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path}: not a safetensors file: {error}") from error
    except KeyError as error:
        raise CacheError(f"{path}: holds tensors of type {error}") from error
    if about.get("architecture") != "wan":
        raise CacheError(f"{path}: its metadata say architecture {about.get('architecture')!r}, not 'wan'")
    return shapes, about


_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "I32": "int32", "I64": "int64"}


def _only(path: Path, shapes: Shapes, pattern: re.Pattern[str]) -> tuple[str, tuple[int, ...]]:
    """The one tensor whose name is of a pattern, and its shape."""
    found = [key for key in shapes if pattern.fullmatch(key)]
    if len(found) != 1:
        raise CacheError(f"{path}: has {len(found)} tensors named like {pattern.pattern}, not one")
    return found[0], shapes[found[0]][0]


def _by_stem(clips: Sequence[Clip], experts: ExpertSet) -> dict[str, Clip]:
    """The clip of each video file; `WanmoeError` where two of one stem say different things."""
    found: dict[str, Clip] = {}
    for clip in clips:
        other = found.setdefault(clip.video_path.stem, clip)
        if _said(other, experts) != _said(clip, experts):
            raise WanmoeError(
                f"{other.origin} and {clip.origin} describe {clip.video_path.stem} differently, but a cache "
                "is found by that name alone; leave one of them out"
            )
    return found


def _said(clip: Clip, experts: ExpertSet) -> object:
    return label(clip, experts), clip.source, clip.split


def _clip(cache: Cache, listed: Clip | None) -> Clip:
    """The clip of a cache: its caption is the one that was encoded, the rest is what the list says."""
    tools = " ".join(tools_of(cache.caption))
    own = Clip(
        video_path=cache.path,
        caption=cache.caption,
        id=cache.stem,
        source=recording(cache.stem),
        origin=str(cache.path),
        tools=tools,
    )
    if listed is None:
        return own
    return Clip(
        video_path=cache.path,
        caption=cache.caption,
        id=cache.stem,
        source=clip_source(listed),
        origin=str(cache.path),
        caption_zh=listed.caption_zh,
        instruments=listed.instruments,
        instrument_label=listed.instrument_label,
        tools=tools or listed.tools,
        split=listed.split,
        phase=listed.phase,
        triplets=listed.triplets,
        licence=listed.licence,
    )


def _notes(caches: Sequence[Cache], listed: Mapping[str, Clip]) -> list[str]:
    notes = []
    if any(cache.latent.endswith("float32") for cache in caches):
        notes.append("latents of 32 bits are stored as float16")
    if listed and (absent := sum(cache.stem not in listed for cache in caches)):
        notes.append(f"{absent} caches have no line in the clip list; their labels come from their captions")
    return notes


def _split(
    clips: Sequence[Clip],
    labels: Sequence[tuple[tuple[str, float], ...]],
    caches: Sequence[Cache],
    val_fraction: float,
    seed: int,
) -> tuple[list[Clip], list[str]]:
    """The clips with a split each, by source; no cache is long enough to be cut in time."""
    infos = {cache.path: VideoInfo(FPS, cache.frames, *cache.video_size) for cache in caches}
    longest = max(cache.frames for cache in caches)
    names = [[name for name, _ in own] for own in labels]
    return assign_splits(clips, names, infos, val_fraction=val_fraction, frames=longest, fps=None, seed=seed)


def _add(
    writer: ShardWriter,
    plan: Plan,
    cache: Cache,
    clip: Clip,
    instruments: tuple[tuple[str, float], ...],
    keys: dict[str, tuple[str, Path]],
) -> None:
    """Write the sample of a cache; `keys` has content and file of those before it."""
    tensors, context = _load(cache.path), _load(cache.text_path)
    content = tensors_sha256(tensors, cache.caption)
    key = sample_key(clip.source, cache.stem, cache.first, content)
    other = keys.setdefault(key, (content, cache.path))
    if key in writer:
        if other[0] != content:
            raise CacheError(f"{other[1]} and {cache.path}: different caches have one key, {key}; rename one")
        plan.drop(str(cache.path), "the same cache twice")
        return
    latent = _checked(tensors[cache.latent], cache.path, cache.latent)
    image = None if cache.image is None else _checked(tensors[cache.image], cache.path, cache.image)
    meta = {
        "caption": clip.caption,
        "caption_zh": clip.caption_zh,
        "instruments": [{"name": name, "weight": weight} for name, weight in instruments],
        "fps": FPS,
        "n_frames": cache.frames,
        "size": [side * SPACE_STRIDE for side in latent.shape[2:]],
        "source": clip.source,
        "source_size": list(cache.video_size),
        "cache": {"name": cache.name, "first_frame": cache.first},
        "phase": clip.phase,
        "triplets": list(clip.triplets),
        "licence": clip.licence,
        "tips": [],
        "boxes": [],
    }
    text = _checked(context[cache.context], cache.text_path, cache.context)
    writer.add(key, clip.split or "train", latent, text, meta, image_latent=image)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path}: cannot be read: {error}") from error


def _checked(tensor: Tensor, path: Path, name: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CacheError(f"{path}: {name} holds NaN or infinity")
    try:
        return narrow(tensor, f"{path}: {name}")
    except WanmoeError as error:
        raise CacheError(str(error)) from error


def _made_by(name: str, model: Codec | TextEncoder | None) -> dict[str, Any]:
    return {"name": name, "fingerprint": "unknown" if model is None else model.fingerprint, "stand_in": False}
