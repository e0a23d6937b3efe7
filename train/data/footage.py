"""Footage: videos found by name, and what a look at their pictures says: where scenes begin, what is black,
and which windows are copies.

A video is decoded once, small; only numbers are kept of it. Letters: N frames looked at, or windows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import remembered_sha256
from ...moe_lora.video import VideoInfo, open_video, video_info
from .clip_list import SUFFIXES
from .segment import Segment
from .sources import CHOLEC, recording

Videos = Path | Sequence[Path] | Mapping[str, Path]
"""Folders of videos, or the file of each name."""
HEIGHT = 64  # rows of the pictures looked at
# AdaptiveDetector compares a frame with two on each side: without these, cuts at the ends of a span are lost.
MARGIN = 3
_BLACK_LUMA, _BLACK_DEVIATION = 16.0, 8.0  # of 255; a lamp in the dark has a low mean too, but deviates
_BLACK_SHARE = 0.1
_LATE = 0.5  # frames; whole milliseconds, as Matroska has them, are 0.02
_GRID = 8  # cells across and down of a picture's grey levels
_MOMENTS = 5
# Largest difference of a cell, of 255. Re-encoded copies (two thirds of the size and less, crf 30 to 38) of a
# laparoscopy, of a film and of signs before a still camera: 9 at most. Other moments and other signs: 28 at
# least. 64-bit difference hashes do not tell them apart: copies differ by up to 2.2 bits, two signs by 0.8.
_COPY_LEVELS = 14


class _End(Exception):
    """Where the frames of a video stop, and why."""

    def __init__(self, frames: int, cause: str) -> None:
        super().__init__(cause)
        self.frames = frames


class VideoFiles:
    """The videos: found by name, each read for its head and sum once."""

    def __init__(self, videos: Videos) -> None:
        self.infos: dict[Path, VideoInfo] = {}
        self._digests: dict[Path, str] = {}
        self._named: dict[str, list[Path]] = {}
        if isinstance(videos, Mapping):
            self.where = f"the videos given ({len(videos)})"
            self._named = {name: [path] for name, path in videos.items()}
        else:
            folders = [videos] if isinstance(videos, Path) else videos
            self.where = " and ".join(str(folder) for folder in folders)
            files = (path for folder in folders for path in sorted(folder.rglob("*")))
            for path in dict.fromkeys(files):
                if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                    self._named.setdefault(path.stem, []).append(path)

    def find(self, segment: Segment) -> Path:
        """The file of a segment's video: of its name, else of another spelling of it."""
        paths = self._named.get(segment.video) or [
            path for name, own in self._named.items() if _key(name) == _key(segment.video) for path in own
        ]
        if len(paths) == 1:
            return paths[0]
        if paths:
            raise WanmoeError(
                f"{segment.origin}: the video {segment.video!r} may be {paths[0]} or {paths[1]}; "
                "keep one of them in the folder of videos"
            )
        raise WanmoeError(
            f"{segment.origin}: there is no video {segment.video!r} in {self.where} ({', '.join(SUFFIXES)}); "
            "name the folder of the videos, or the video where the annotation has another name"
        )

    def info(self, path: Path, origin: str) -> VideoInfo:
        """The head of a video, kept in `infos`; `origin` is who asks for it."""
        if path not in self.infos:
            try:
                self.infos[path] = video_info(path)
            except WanmoeError as error:
                raise WanmoeError(str(error) if origin == str(path) else f"{origin}: {error}") from error
        return self.infos[path]

    def digest(self, path: Path) -> str:
        """The SHA-256 of a video."""
        if path not in self._digests:
            self._digests[path] = remembered_sha256(path)
        return self._digests[path]


def _key(name: str) -> str:
    return recording(name) if CHOLEC.fullmatch(name) else name.lower()


@dataclass(frozen=True)
class Footage:
    """What was seen of the frames of a video that were looked at."""

    cuts: tuple[int, ...]
    """First frames of new scenes."""
    end: int
    """Frames that can be used: fewer than the file says where it ends before."""
    numbers: NDArray[np.int64]
    """[N] the frames looked at, rising."""
    black: NDArray[np.bool_]
    """[N]."""
    levels: NDArray[np.uint8]
    """[N, 8, 8] mean grey levels of the cells of the picture."""
    fault: str = ""
    """Why it ends before the file says."""

    def is_black(self, frames: Sequence[int]) -> bool:
        """Whether more than a tenth of these frames are black."""
        return bool(self.black[self._places(frames)].mean() > _BLACK_SHARE)

    def fingerprint(self, frames: Sequence[int]) -> NDArray[np.uint8]:
        """Grey levels [5, 8, 8] at five moments of a window: what `copies` compares."""
        moments = np.linspace(0, len(frames) - 1, _MOMENTS).round().astype(int)
        return self.levels[self._places([frames[moment] for moment in moments])]

    def _places(self, frames: Sequence[int]) -> NDArray[np.int64]:
        return np.searchsorted(self.numbers, np.asarray(frames))


def look(
    path: Path, info: VideoInfo, spans: Iterable[tuple[int, int]], step: Callable[[], object] = lambda: None
) -> Footage:
    """Look at the frames of `spans` (first, end) of a video, in one pass; `step` is called for each decoded.

    A video that is damaged, or ends before its header says, is no error: `Footage.end` and `fault` tell.
    Raises WanmoeError where frames do not come at a constant rate: seconds would be other frames.
    """
    runs = _runs(spans, info.frames)
    starts = {run.start for run in runs}
    cuts: list[int] = []
    numbers: list[int] = []
    late: list[float] = []
    black: list[bool] = []
    levels: list[NDArray[np.uint8]] = []
    end, fault = info.frames, ""
    try:
        for number, time, picture in _pictures(path, info, runs, step):
            if number in starts:
                # A ratio to the motion around it, not a level: endoscopes move fast and look alike.
                detector = AdaptiveDetector(min_scene_len=1)
            found = detector.process_frame(FrameTimecode(number, fps=info.fps), picture)
            cuts += [cut.frame_num for cut in found]
            grey = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), dtype=np.uint8)
            black.append(bool(grey.mean() < _BLACK_LUMA and grey.std() < _BLACK_DEVIATION))
            cells = cv2.resize(grey, (_GRID, _GRID), interpolation=cv2.INTER_AREA)
            levels.append(np.asarray(cells, dtype=np.uint8))
            numbers.append(number)
            late.append(time - number / info.fps)
    except _End as error:
        end, fault = error.frames, str(error)
    _check_rate(path, info.fps, numbers, late)
    grid = np.array(levels, dtype=np.uint8).reshape(-1, _GRID, _GRID)
    seen = np.array(numbers, dtype=np.int64)
    return Footage(tuple(cuts), end, seen, np.array(black, dtype=np.bool_), grid, fault)


def _pictures(
    path: Path, info: VideoInfo, runs: Sequence[range], step: Callable[[], object]
) -> Iterator[tuple[int, float, NDArray[np.uint8]]]:
    """Number, time in seconds and picture (BGR, small, upright) of the frames of `runs`."""
    numbers = iter([number for run in runs for number in run])
    wanted = next(numbers, None)
    if wanted is None:
        return
    columns = max(_GRID, round(info.width * HEIGHT / info.height))
    scaler = VideoReformatter()  # one for all: setting up each frame's own takes longer than scaling
    first = 0.0
    with open_video(path) as (container, stream):
        decoded = -1
        try:
            for decoded, frame in enumerate(container.decode(stream)):
                step()
                shown = decoded / info.fps if frame.time is None else frame.time
                first = shown if decoded == 0 else first
                if decoded != wanted:
                    continue
                turns = round(frame.rotation / 90) % 4
                width, height = (HEIGHT, columns) if turns % 2 else (columns, HEIGHT)
                small = scaler.reformat(frame, width, height, "bgr24", interpolation=Interpolation.AREA)
                yield decoded, shown - first, np.ascontiguousarray(np.rot90(small.to_ndarray(), turns))
                wanted = next(numbers, None)
                if wanted is None:
                    return
        except av.FFmpegError as error:
            raise _End(decoded + 1, f"it is damaged ({error.strerror})") from error
    raise _End(decoded + 1, f"it ends there, though its header says {info.frames} frames")


def _check_rate(path: Path, fps: float, numbers: Sequence[int], late: Sequence[float]) -> None:
    """Refuse frames that are shown more than half a frame from where a constant rate puts them."""
    worst = max(range(len(late)), key=lambda place: abs(late[place]), default=None)
    if worst is not None and abs(late[worst]) * fps > _LATE:
        shown, rate = numbers[worst] / fps + late[worst], max(1, round(fps))
        raise WanmoeError(
            f"{path}: its frames do not come at a constant rate: frame {numbers[worst]} is shown at "
            f"{shown:.2f} s, {abs(late[worst]):.2f} s from where {fps:.4g} frames a second put it (the "
            f"farthest of all); rewrite it: ffmpeg -i {path.name} -fps_mode cfr -r {rate} constant.mp4"
        )


def copies(fingerprints: Sequence[NDArray[np.uint8]], videos: Sequence[str]) -> list[int | None]:
    """For each window the earlier one of another video that shows the same pictures, or None.

    Windows of one video are never copies here: they are told apart by their frames, and a still camera gives
    many that look alike.
    """
    prints = np.array(fingerprints, dtype=np.int16).reshape(len(fingerprints), -1)
    numbers = {video: number for number, video in enumerate(dict.fromkeys(videos))}
    video = np.array([numbers[name] for name in videos], dtype=np.int64)
    kept = np.ones(len(prints), dtype=np.bool_)
    out: list[int | None] = []
    for place, own in enumerate(prints):
        others = np.flatnonzero(kept[:place] & (video[:place] != video[place]))
        # The first moment alone rules out nearly all, at a fifth of the cost.
        for part in (slice(0, _GRID * _GRID), slice(None)):
            others = others[np.abs(prints[others, part] - own[part]).max(axis=1, initial=0) <= _COPY_LEVELS]
        out.append(int(others[0]) if len(others) else None)
        kept[place] = not len(others)
    return out


def _runs(spans: Iterable[tuple[int, int]], frames: int) -> list[range]:
    """The spans widened by the margin, joined where they meet, rising."""
    runs: list[range] = []
    for first, end in sorted(spans):
        first, end = max(0, first - MARGIN), min(frames, end + MARGIN)
        if runs and first <= runs[-1].stop:
            runs[-1] = range(runs[-1].start, max(end, runs[-1].stop))
        else:
            runs.append(range(first, end))
    return runs
