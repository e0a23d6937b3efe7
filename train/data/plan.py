"""What `prepare` will encode: clips labelled, split and cut into pieces, and a line for all that is left out.

Letters: F, H, W frames, height, width in pixels.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import file_sha256, remembered_sha256
from ...moe_lora.instruments import ExpertSet
from ...moe_lora.video import Fit, VideoInfo, frame_at, video_info
from .clips import Clip, Window, check_frames, windows
from .shards import histogram_lines
from .sources import clip_source
from .splits import assign_splits

Instruments = tuple[tuple[str, float], ...]
Size = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """How clips become samples; `WanmoeError` where a value cannot be."""

    sizes: tuple[Size, ...]
    """(H, W), multiples of 16; a video takes the one whose shape is nearest to its own."""
    frames: tuple[int, ...]
    """Lengths of windows, 4 n + 1; a clip is cut into the longest first."""
    fps: float | None = None
    window_stride: int | None = None
    val_fraction: float = 0.2
    seed: int = 0
    task: str = "t2v"

    def __post_init__(self) -> None:
        for height, width in self.sizes:
            if any(side < 16 or side % 16 for side in (height, width)):
                raise WanmoeError(f"size is {height} x {width}; height and width are multiples of 16")
        for length in self.frames:
            check_frames(length)
        if not self.sizes or not self.frames:
            raise WanmoeError("prepare needs at least one size and one number of frames")
        if self.task not in ("t2v", "i2v"):
            raise WanmoeError(f'task is "t2v" or "i2v", got {self.task!r}')


class Source(NamedTuple):
    """A video file, or a clip's masks, as the plan knows it."""

    sha256: str
    info: VideoInfo | None = None


class Piece(NamedTuple):
    """One window of one clip, to become one sample."""

    key: str
    clip: Clip
    instruments: Instruments
    window: Window
    fps: float
    """Frames a second of the window."""
    fit: Fit
    info: VideoInfo
    sha256: str
    """Of the video file."""
    masks_sha256: str

    @property
    def content(self) -> object:
        """What is seen and said: pieces of equal content are one."""
        size = (self.fit.height, self.fit.width)
        return self.sha256, self.window.indices, size, self.clip.caption

    def digest(self) -> str:
        """SHA-256 of all that decides the sample, wherever its files lie."""
        clip = replace(self.clip, video_path=Path(), masks=None, origin="")
        return hashlib.sha256(repr(self._replace(clip=clip)).encode()).hexdigest()


@dataclass
class Plan:
    """What will be encoded, in the order of the shards, and what was left out."""

    pieces: list[Piece] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Where the first clip was read that was dropped for a reason."""
    notes: list[str] = field(default_factory=list)

    def drop(self, origin: str, reason: str) -> None:
        """Count what is left out; `origin` is where it was read."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, origin)

    def captions(self) -> list[str]:
        """Every caption once, and the empty one, which training without captions needs."""
        return list(dict.fromkeys(["", *(piece.clip.caption for piece in self.pieces)]))


def files_of(clips: Sequence[Clip]) -> list[tuple[Path, str]]:
    """Every file (or folder of masks) that the clips name, once, with the first line that names it."""
    named: dict[Path, str] = {}
    for clip in clips:
        for path in (clip.video_path, clip.masks):
            if path is not None:
                named.setdefault(path, clip.origin)
    return list(named.items())


def read_source(path: Path, origin: str, *, is_video: bool) -> Source:
    """The digest of a file or folder, and of a video its head; `WanmoeError` names the clip's line."""
    try:
        if is_video:
            info = video_info(path)
            return Source(remembered_sha256(path), info)
        if path.is_dir():
            pictures = sorted(path.glob("*.png"))
            return Source(_digest([(one.name, file_sha256(one)) for one in pictures]))
        return Source(file_sha256(path))
    except FileNotFoundError as error:
        raise WanmoeError(f"{origin}: no such file or folder of masks: {path}") from error
    except OSError as error:
        raise WanmoeError(f"{origin}: {path}: cannot be read: {error.strerror}") from error
    except WanmoeError as error:
        raise WanmoeError(str(error) if origin == str(path) else f"{origin}: {error}") from error


def make_plan(
    clips: Sequence[Clip], experts: ExpertSet, sources: Mapping[Path, Source], settings: Settings
) -> Plan:
    """Label and split the clips, and cut them into windows; encodes nothing.

    `sources` has what `read_source` says of every file of `files_of`. Raises `WanmoeError` on labels that the
    experts do not know, and where no window is left.
    """
    plan = Plan()
    clips = [replace(clip, source=clip_source(clip)) for clip in clips]
    infos = {path: source.info for path, source in sources.items() if source.info is not None}
    labels = [label(clip, experts) for clip in clips]
    by_origin = {(clip.origin, clip.video_path): own for clip, own in zip(clips, labels, strict=True)}
    split, plan.notes = assign_splits(
        clips,
        [[name for name, _ in own] for own in labels],
        infos,
        val_fraction=settings.val_fraction,
        frames=min(settings.frames),
        fps=settings.fps,
        seed=settings.seed,
    )
    trained: dict[str, set[int]] = {}
    pieces: list[Piece] = []
    for clip in sorted(split, key=lambda clip: clip.split != "train"):  # training first: it claims its frames
        cut = _cut(clip, infos[clip.video_path], settings)
        if not cut:
            length, fps = (clip.frames or min(settings.frames), clip.fps if clip.frames else settings.fps)
            rate = f"{fps:g} fps" if fps else "its own rate"
            plan.drop(clip.origin, f"clip shorter than {length} frames at {rate}")
        claimed = trained.setdefault(sources[clip.video_path].sha256, set())
        for window in cut:
            span = range(window.indices[0], window.indices[-1] + 1)
            if clip.split == "train":
                claimed.update(span)
            elif not claimed.isdisjoint(span):
                plan.drop(clip.origin, "held-out window shares frames with training")
                continue
            pieces.append(_piece(clip, by_origin[clip.origin, clip.video_path], window, sources, settings))
    plan.notes += _windows_already(clips, infos, settings)
    if not pieces:
        causes = "; ".join(f"{count} x {reason}" for reason, count in plan.dropped.items())
        raise WanmoeError(f"no sample is left of {len(clips)} clips: {causes}; lower frames or fps")
    files = {path: number for number, path in enumerate(dict.fromkeys(clip.video_path for clip in clips))}
    first: dict[str, Piece] = {}
    for piece in sorted(pieces, key=lambda piece: (files[piece.clip.video_path], piece.window.indices[0])):
        other = first.setdefault(piece.key, piece)
        if other is piece:
            plan.pieces.append(piece)
        elif other.content == piece.content:
            plan.drop(piece.clip.origin, "the same window and caption twice")
        else:
            raise WanmoeError(
                f"{other.clip.origin} and {piece.clip.origin}: different samples have one key, {piece.key}; "
                "give one of them another id"
            )
    return plan


def recipe(plan: Plan, settings: Settings, makers: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the encoded samples, as JSON values: an equal one makes equal samples.

    `makers` says what encodes: codec, text encoder, device, versions.
    """
    return {
        **makers,
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        "samples": {piece.key: piece.digest() for piece in plan.pieces},
    }


def label(clip: Clip, experts: ExpertSet) -> Instruments:
    """The instruments of a clip as names of `experts` with weights that sum to 1; () is no evidence.

    Raises `WanmoeError` that names the line where a label is not in the set.
    """
    if clip.instruments is not None:
        try:
            return tuple(experts.shares(clip.instruments).items())
        except WanmoeError as error:
            raise WanmoeError(
                f"{clip.origin}: {error}; your own experts are given by --experts CONFIG"
            ) from error
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


def sample_key(source: str, name: str, number: int, content: object) -> str:
    """`<source>_<clip>-w<window>_<hash>`: equal names in two folders differ by the hash of `content`."""
    source, name = (re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[-22:] for text in (source, name))
    return f"{source or 'video'}_{name or 'clip'}-w{number:03d}_{_digest(content)[:16]}"


def nearest_size(info: VideoInfo, sizes: Sequence[Size]) -> Size:
    """The size whose ratio of width to height is nearest to the video's; the first of equally near ones."""
    shape = math.log(info.width / info.height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - shape))


def _cut(clip: Clip, info: VideoInfo, settings: Settings) -> list[Window]:
    """Windows of the longest length that fits, then of shorter ones in what is left behind them."""
    fps, stride = settings.fps, settings.window_stride
    if clip.frames is not None:
        return windows(clip, info, frames=clip.frames)
    ratio = info.fps / fps if fps else 1.0
    end = min(info.frames, clip.start_frame + (clip.num_frames or info.frames))
    found: list[Window] = []
    rest = clip
    for length in sorted(set(settings.frames), reverse=True):
        own = windows(rest, info, frames=length, fps=fps, stride=stride)
        found += [Window(len(found) + window.number, window.indices) for window in own]
        if own:
            used = (len(own) - 1) * (stride or length) + length
            start = frame_at(rest.start_frame, used, ratio)
            if start >= end:
                break
            rest = replace(rest, start_frame=start, num_frames=end - start)
    return found


def _windows_already(clips: Sequence[Clip], infos: Mapping[Path, VideoInfo], settings: Settings) -> list[str]:
    """A note where clips were cut with other settings than these, which do not change them."""
    fixed: Counter[str] = Counter()
    for clip in clips:
        own = infos[clip.video_path].fps
        length, rate = clip.frames, clip.fps or own
        others = length not in settings.frames or rate != (settings.fps or own) or settings.window_stride
        if length is not None and others:
            fixed[f"{length} frames at {rate:g} fps"] += 1
    return [
        f"{count} clips are windows of {kind} already and stay so, whatever --frames, --fps and --stride say"
        for kind, count in sorted(fixed.items())
    ]


def _piece(
    clip: Clip,
    instruments: Instruments,
    window: Window,
    sources: Mapping[Path, Source],
    settings: Settings,
) -> Piece:
    sha256, info = sources[clip.video_path]
    assert info is not None
    size = nearest_size(info, settings.sizes)
    piece = Piece(
        key="",
        clip=clip,
        instruments=instruments,
        window=window,
        fps=(clip.fps if clip.frames is not None else settings.fps) or info.fps,
        fit=Fit.cover((info.height, info.width), size),
        info=info,
        sha256=sha256,
        masks_sha256="" if clip.masks is None else sources[clip.masks].sha256,
    )
    return piece._replace(key=sample_key(clip.source, clip.id, window.number, piece.content))


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _plain(value: object) -> object:
    """Tuples as the lists that JSON gives back."""
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
