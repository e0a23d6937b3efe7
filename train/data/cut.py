"""Annotated stretches of videos to clips of one window each: scenes, lengths, labels and splits.

Times become frames of the file; scene cuts split; windows are as long as fit; black ones and copies go.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from ...moe_lora.errors import WanmoeError
from ...moe_lora.instruments import ExpertSet
from ...moe_lora.video import VideoInfo, frame_at
from .captions import clean_caption, skip_reason, tools_of
from .clips import Box, Clip, Polygon, Tip, check_frames, window_span, windows
from .footage import MARGIN, Footage, VideoFiles, Videos, copies, look
from .plan import Instruments, label
from .segment import Moment, Segment
from .shards import histogram, histogram_lines
from .sources import recording
from .splits import assign_splits

Mark = TypeVar("Mark", Tip, Box, Polygon)
_SAME = 0.9  # intersection over union from which two windows are one
_REACH = 1.0  # seconds: how far outside a window a mark still says where the instrument is in it


@dataclass
class CutReport:
    """The clips, what was left out and why, and how the instruments are spread."""

    clips: list[Clip] = field(default_factory=list)
    """One window each, by video and time."""
    segments: int = 0
    videos: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Where the first was read that was dropped for a reason."""
    histogram: dict[str, dict[str, float]] = field(default_factory=dict)
    """Sum of weights per split and expert, "(no evidence)" apart."""
    notes: list[str] = field(default_factory=list)

    def drop(self, origin: str, reason: str) -> None:
        """Count what is left out."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, origin)

    def lines(self) -> list[str]:
        """The report as lines of text."""
        return [
            f"kept {_count(len(self.clips), 'window')} of {_count(self.segments, 'segment')} "
            f"from {_count(self.videos, 'video')}",
            *(
                f"dropped {count}: {reason} (first: {self.examples[reason]})"
                for reason, count in sorted(self.dropped.items())
            ),
            *(f"note: {note}" for note in self.notes),
            *histogram_lines(self.histogram),
        ]


class _Piece(NamedTuple):
    """A window with its label and the frames that it takes."""

    clip: Clip
    instruments: Instruments
    indices: tuple[int, ...]


def cut_segments(
    segments: Sequence[Segment | Clip],
    videos: Videos,
    *,
    frames: Sequence[int] = (81,),
    fps: float = 16.0,
    seconds: tuple[float, float] = (2.0, 20.0),
    experts: ExpertSet,
    val_fraction: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> CutReport:
    """Cut segments into clips that are one window each.

    Args:
        segments: what annotations say, or clips, each of which counts as a segment.
        videos: folders in which the segments' videos lie, or the file of each name; clips name their own.
        frames: lengths of windows, each 4 n + 1, counted at `fps`: as many of the longest as fit, then of
            the next.
        seconds: shortest and longest of a segment, and of what scene cuts leave of it.
        experts: the experts that labels are counted by. The clips keep the labels that they came with.

    Raises WanmoeError that names the segment and the way out: a missing or unreadable video, an unknown
    instrument, and where nothing is left.
    """
    sizes = _checked(frames, fps, seconds)
    report = CutReport(segments=len(segments))
    files = VideoFiles(videos)
    found = [clip for segment in segments if (clip := _clip(segment, files, report)) is not None]
    report.videos = len({clip.video_path for clip in found})
    for clip in found:  # an unknown label is said before hours of video are decoded
        label(clip, experts)
    parts, footage = _scenes(found, files, seconds, report, progress)
    labels = [[name for name, _ in label(part, experts)] for part in parts]
    split, notes = assign_splits(
        parts, labels, files.infos, val_fraction=val_fraction, frames=sizes[-1], fps=fps, seed=seed
    )
    pieces = []
    for part in sorted(split, key=lambda part: part.split != "train"):  # training first: it claims its frames
        cut = _windows(part, files.infos[part.video_path], sizes, fps)
        if not cut:
            report.drop(part.origin, f"shorter than a window of {sizes[-1]} frames at {fps:g} fps")
        for clip in cut:
            (window,) = windows(clip, files.infos[clip.video_path], frames=sizes[-1])
            pieces.append(_Piece(clip, label(clip, experts), window.indices))
    pieces = _unlike(pieces, footage, files, report)
    if not pieces:
        causes = "; ".join(f"{count} x {reason}" for reason, count in sorted(report.dropped.items()))
        raise WanmoeError(
            f"no window is left of {_count(len(segments), 'segment')}: {causes}; lower the frames, or "
            "widen the seconds"
        )
    order = {path: number for number, path in enumerate(files.infos)}
    pieces.sort(key=lambda piece: (order[piece.clip.video_path], piece.clip.start_frame))
    report.clips = _named([piece.clip for piece in pieces], files.infos)
    shown = {name for piece in pieces for name, _ in piece.instruments}
    report.notes += [
        *notes,
        *(
            f"no window is left that shows {name}: see what was dropped"
            for name in dict.fromkeys(name for names in labels for name in names)
            if name not in shown
        ),
    ]
    report.histogram = histogram(
        [
            {
                "split": clip.split,
                "instruments": [{"name": name, "weight": weight} for name, weight in instruments],
            }
            for clip, instruments, _ in pieces
        ]
    )
    return report


def _clip(segment: Segment | Clip, files: VideoFiles, report: CutReport) -> Clip | None:
    """The segment in frames and pixels of its video, captions cleaned; None where it is not kept."""
    said = [text for text in (segment.caption, segment.caption_zh) if text]
    skipped = next((reason for text in said if (reason := skip_reason(text))), None)
    if skipped or not clean_caption(segment.caption):
        report.drop(segment.origin, skipped or "nothing of the caption is left when it is cleaned")
        return None
    if isinstance(segment, Clip):
        clip, info = segment, files.info(segment.video_path, segment.origin)
    else:
        path = files.find(segment)
        info = files.info(path, segment.origin)
        clip = _in_frames(segment, path, info)
    named = tools_of(" ".join(said))
    end = min(info.frames, clip.start_frame + (clip.num_frames or info.frames))
    if end <= clip.start_frame:
        report.drop(clip.origin, "outside the video")
        return None
    return replace(
        clip,
        caption=clean_caption(clip.caption),
        caption_zh=clean_caption(clip.caption_zh or "") or None,
        tools=", ".join(dict.fromkeys([*([clip.tools] if clip.tools else []), *named])),
        source=recording(clip.source),
        num_frames=end - clip.start_frame,
        frames=None,
        fps=None,
    )


def _in_frames(segment: Segment, path: Path, info: VideoInfo) -> Clip:
    """The segment as a clip that may reach past the video's end."""
    start = frame_at(0, 1, max(0.0, segment.start) * info.fps)
    marks = [_in_pixels(moment, info) for moment in segment.moments]
    return Clip(
        video_path=path,
        caption=segment.caption,
        id=segment.video,
        source=segment.video,
        origin=segment.origin,
        caption_zh=segment.caption_zh,
        instruments=segment.instruments,
        tools=", ".join(segment.tools),
        split=segment.split,
        start_frame=start,
        # 0 would stand for "to the end".
        num_frames=max(1, frame_at(0, 1, segment.end * info.fps) - start),
        tips=tuple(mark for mark in marks if isinstance(mark, Tip)),
        boxes=tuple(mark for mark in marks if isinstance(mark, Box)),
        polygons=tuple(mark for mark in marks if isinstance(mark, Polygon)),
        phase=segment.phase,
        triplets=segment.triplets,
        licence=segment.licence,
    )


def _in_pixels(moment: Moment, info: VideoInfo) -> Tip | Box | Polygon:
    """Shares of the picture as pixels. The centre of a pixel is a whole number; a box begins at its edge."""
    frame, mark = frame_at(0, 1, moment.seconds * info.fps), moment.mark
    width, height = info.width, info.height
    if isinstance(mark, Tip):
        return mark._replace(frame=frame, x=mark.x * width - 0.5, y=mark.y * height - 0.5)
    if isinstance(mark, Polygon):
        points = tuple((x * width - 0.5, y * height - 0.5) for x, y in mark.points)
        return mark._replace(frame=frame, points=points)
    x, y, across, down = mark.x * width, mark.y * height, mark.width * width, mark.height * height
    return mark._replace(frame=frame, x=x, y=y, width=across, height=down)


def _scenes(
    clips: Sequence[Clip],
    files: VideoFiles,
    seconds: tuple[float, float],
    report: CutReport,
    progress: bool,
) -> tuple[list[Clip], dict[Path, Footage]]:
    """What scene cuts leave of the clips, by length; and what was seen of each video."""
    kept: dict[Path, list[Clip]] = {}
    for clip in clips:
        if _fits(clip, files.infos[clip.video_path].fps, seconds, report):
            kept.setdefault(clip.video_path, []).append(clip)
    parts, footage, short = [], {}, []
    places = divided = 0
    spans = {
        path: [(clip.start_frame, clip.start_frame + (clip.num_frames or 0)) for clip in own]
        for path, own in kept.items()
    }
    lasts = {path: max(end for _, end in own) + MARGIN for path, own in spans.items()}
    total = sum(min(files.infos[path].frames, last) for path, last in lasts.items())
    with tqdm(total=total, unit="frame", desc="look", disable=not progress) as bar:
        for path, own in kept.items():
            info = files.infos[path]
            seen = footage[path] = look(path, info, spans[path], bar.update)
            if seen.fault:
                short.append(f"{path} at frame {seen.end} ({seen.fault})")
            for clip, (start, end) in zip(own, spans[path], strict=True):
                end = min(end, seen.end)
                inside = [cut for cut in seen.cuts if start < cut < end]
                places, divided = places + len(inside), divided + bool(inside)
                for first, last in zip([start, *inside], [*inside, end], strict=True):
                    part = _in_scene(replace(clip, start_frame=first, num_frames=last - first), seen.cuts)
                    if end <= start:
                        report.drop(clip.origin, "outside the video")
                    elif _fits(part, info.fps, seconds, report):
                        parts.append(part)
    if short:
        report.notes.append(f"{_count(len(short), 'video ends', 'videos end')} early: {'; '.join(short)}")
    if divided:
        report.notes.append(
            f"{_count(divided, 'segment is', 'segments are')} split at {_count(places, 'scene cut')}"
        )
    return parts, footage


def _fits(clip: Clip, fps: float, seconds: tuple[float, float], report: CutReport) -> bool:
    """Whether its length is kept; a frame either way is the rounding of times to frames."""
    length = clip.num_frames or 0
    if length + 1 < seconds[0] * fps:
        report.drop(clip.origin, f"shorter than {seconds[0]:g} s")
    elif length - 1 > seconds[1] * fps:
        report.drop(clip.origin, f"longer than {seconds[1]:g} s")
    else:
        return True
    return False


def _in_scene(clip: Clip, cuts: Sequence[int]) -> Clip:
    """Without the marks of the scenes before and after: no motion leads from there into this one."""
    start, end = clip.start_frame, clip.start_frame + (clip.num_frames or 0)
    after = [cut for cut in cuts if cut >= end]
    span = range(max((cut for cut in cuts if cut <= start), default=0), min(after, default=1 << 62))
    return replace(
        clip,
        tips=tuple(mark for mark in clip.tips if mark.frame in span),
        boxes=tuple(mark for mark in clip.boxes if mark.frame in span),
        polygons=tuple(mark for mark in clip.polygons if mark.frame in span),
    )


def _windows(part: Clip, info: VideoInfo, sizes: Sequence[int], fps: float) -> list[Clip]:
    """As many windows of the longest size as fit one after another, then of the next in what is left."""
    out = []
    first, end = part.start_frame, part.start_frame + (part.num_frames or 0)
    reach = round(_REACH * info.fps)
    for size in sizes:
        span = window_span(info, size, fps)
        while first + span <= end:
            if part.masks is not None and not part.masks.is_dir() and first != part.masks_from:
                raise WanmoeError(
                    f"{part.origin}: the masks are one picture that begins with frame {part.masks_from}, but "
                    f"a window begins with frame {first}; give a folder of <frame>.png instead: {part.masks}"
                )
            out.append(
                replace(
                    part,
                    start_frame=first,
                    num_frames=span,
                    frames=size,
                    fps=fps,
                    tips=_near(part.tips, first, first + span, reach),
                    boxes=_near(part.boxes, first, first + span, reach),
                    polygons=_near(part.polygons, first, first + span, reach),
                )
            )
            first += max(span, frame_at(0, size, info.fps / fps))
    return out


def _near(marks: Sequence[Mark], start: int, end: int, reach: int) -> tuple[Mark, ...]:
    """The marks in a window, and of each instrument and track the last before it and the first after it."""
    before: dict[tuple[str, str], int] = {}
    after: dict[tuple[str, str], int] = {}
    for mark in marks:
        who = (mark.instrument, mark.track)
        if start - reach <= mark.frame < start:
            before[who] = max(mark.frame, before.get(who, mark.frame))
        elif end <= mark.frame < end + reach:
            after[who] = min(mark.frame, after.get(who, mark.frame))
    return tuple(
        mark
        for mark in marks
        if start <= mark.frame < end
        or mark.frame in (before.get(who := (mark.instrument, mark.track)), after.get(who))
    )


def _unlike(
    pieces: Iterable[_Piece], footage: Mapping[Path, Footage], files: VideoFiles, report: CutReport
) -> list[_Piece]:
    """The windows without black ones, and those that an earlier one has already, whatever file it is of."""
    spans: dict[str, list[tuple[int, int]]] = {}
    trained: dict[str, set[int]] = {}
    by_length: dict[int, list[_Piece]] = {}
    for piece in pieces:
        clip, (first, *_, last) = piece.clip, piece.indices
        digest = files.digest(clip.video_path)
        own, claimed = spans.setdefault(digest, []), trained.setdefault(digest, set())
        if footage[clip.video_path].is_black(piece.indices):
            report.drop(clip.origin, "black pictures")
        elif clip.split == "val" and not claimed.isdisjoint(range(first, last + 1)):
            report.drop(clip.origin, "held-out window shares frames with training")
        elif any(_overlap(other, (first, last + 1)) > _SAME for other in own):
            report.drop(clip.origin, "the same frames of a video twice")
        else:
            own.append((first, last + 1))
            if clip.split == "train":
                claimed.update(range(first, last + 1))
            by_length.setdefault(len(piece.indices), []).append(piece)
    kept = []
    for group in by_length.values():
        prints = [footage[clip.video_path].fingerprint(indices) for clip, _, indices in group]
        same = copies(prints, [files.digest(piece.clip.video_path) for piece in group])
        for piece, copied in zip(group, same, strict=True):
            if copied is None:
                kept.append(piece)
            else:
                report.drop(piece.clip.origin, "the same pictures in another video file")
    return kept


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Intersection over union of two spans (first, end)."""
    shared = max(0, min(one[1], other[1]) - max(one[0], other[0]))
    return shared / (one[1] - one[0] + other[1] - other[0] - shared)


def _named(clips: Sequence[Clip], infos: Mapping[Path, VideoInfo]) -> list[Clip]:
    """The clips with ids: source and milliseconds, numbered where that is not enough."""
    counts: Counter[str] = Counter()
    out = []
    for clip in clips:
        name = f"{clip.source}-{round(1000 * clip.start_frame / infos[clip.video_path].fps)}"
        counts[name] += 1
        out.append(replace(clip, id=name if counts[name] == 1 else f"{name}-{counts[name]}"))
    return out


def _checked(frames: Sequence[int], fps: float, seconds: tuple[float, float]) -> list[int]:
    """The lengths of windows, longest first."""
    for size in frames:
        check_frames(size)
    if not frames or not fps > 0:
        raise WanmoeError(
            f"frames {list(frames)} and fps {fps:g}: give at least one length and a positive rate"
        )
    if not 0 < seconds[0] <= seconds[1]:
        raise WanmoeError(
            f"seconds are {seconds[0]:g} to {seconds[1]:g}; give the shortest, then the longest"
        )
    return sorted(set(frames), reverse=True)
