"""Video files in and out: PyAV for the files, OpenCV for the resampling.

Letters: F frames, H, W height and width in pixels. Frames are RGB, uint8 `[F, H, W, 3]`; the model's own form
is float32 `[3, F, H, W]` in [-1, 1], and only `to_model` and `to_frames` go between the two.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import WanmoeError
from .files import write_atomic

Picture = NDArray[np.uint8]


class VideoEndError(WanmoeError):
    """A video that has fewer frames than were asked for."""


class VideoDamagedError(VideoEndError):
    """A video of which only the frames before a damaged one can be had."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself: frames a second, number of frames, and the size as shown."""

    fps: float
    frames: int
    height: int
    width: int


class Fit(NamedTuple):
    """How a picture is scaled to `rows` x `cols` and cut at (`top`, `left`) to give `height` x `width`."""

    rows: int
    cols: int
    top: int
    left: int
    height: int
    width: int
    source: tuple[int, int]

    @staticmethod
    def cover(source: tuple[int, int], size: tuple[int, int] | None) -> "Fit":
        """The smallest scaling of `source` (H, W) that covers `size`, cut in the centre."""
        height, width = size or source
        scale = max(height / source[0], width / source[1])
        rows, cols = max(height, round(source[0] * scale)), max(width, round(source[1] * scale))
        return Fit(rows, cols, (rows - height) // 2, (cols - width) // 2, height, width, source)

    def picture(self, picture: Picture, *, nearest: bool = False) -> Picture:
        """`picture` [H, W] or [H, W, 3] scaled and cut; `nearest` keeps the values of a mask."""
        if picture.shape[:2] != (self.rows, self.cols):
            shrinks = self.rows < picture.shape[0]
            smooth = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
            how = cv2.INTER_NEAREST if nearest else smooth
            picture = np.asarray(
                cv2.resize(picture, (self.cols, self.rows), interpolation=how), dtype=np.uint8
            )
        return picture[self.top : self.top + self.height, self.left : self.left + self.width]

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Where the source pixel (x, y) lies afterwards; pixel centres are whole numbers."""
        new_x = (x + 0.5) * self.cols / self.source[1] - 0.5 - self.left
        new_y = (y + 0.5) * self.rows / self.source[0] - 0.5 - self.top
        return new_x, new_y


def video_info(path: str | Path) -> VideoInfo:
    """Read size, rate and length of the first decodable video stream; errors as in `read_video`."""
    with open_video(path) as (container, stream):
        picture = _upright(next(_frames(container, stream, path)))
        rate = _rate(stream, path)
        frames = stream.frames
    if not frames:  # mkv and webm do not store the length: count the packets, which decodes nothing
        with open_video(path) as (container, stream):
            frames = sum(1 for packet in container.demux(stream) if packet.size)
    return VideoInfo(rate, frames, picture.shape[0], picture.shape[1])


def read_video(
    path: str | Path,
    *,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    start_frame: int = 0,
    num_frames: int | None = None,
) -> Tensor:
    """Read RGB frames, uint8 [F, H, W, 3], from the first decodable video stream.

    `start_frame` counts frames of the file; `num_frames` counts frames that come back (all that follow when
    None). With `fps` the frame nearest in time is taken, the file's rate being its average; with `size` (H,
    W) the picture is scaled to cover it and cut in the centre. A rotation that a phone left in the metadata
    is applied. Raises `WanmoeError` that names the file and the cause: missing, not a video, damaged, or
    ending before `num_frames`.
    """
    _check_range(start_frame, num_frames, fps)
    pictures: list[Picture] = []
    fit: Fit | None = None
    with open_video(path) as (container, stream):
        ratio = _rate(stream, path) / fps if fps else 1.0
        for number, frame in enumerate(_frames(container, stream, path)):
            while num_frames is None or len(pictures) < num_frames:
                if frame_at(start_frame, len(pictures), ratio) != number:
                    break
                picture = _upright(frame)
                fit = fit or Fit.cover(picture.shape[:2], size)
                pictures.append(fit.picture(picture))
            if num_frames is not None and len(pictures) == num_frames:
                break
    if not pictures or (num_frames is not None and len(pictures) < num_frames):
        raise VideoEndError(
            f"{path}: the video ends after {number + 1} frames; "
            f"{num_frames or 'frames'} from frame {start_frame} were asked for"
        )
    return torch.from_numpy(np.stack(pictures))


def iter_windows(
    path: str | Path, windows: Sequence[Sequence[int]], size: tuple[int, int] | None
) -> Iterator[Tensor]:
    """Yield the frames of each window, uint8 [F, H, W, 3], in one pass over the file.

    A window is a rising list of frame numbers of the file; windows come sorted by their first frame and may
    overlap. Errors as in `read_video`.
    """
    if not windows:
        return
    firsts = [window[0] for window in windows]
    if firsts != sorted(firsts):
        raise ValueError("windows must be sorted by their first frame")
    wanted = {number for window in windows for number in window}
    kept: dict[int, Picture] = {}
    turn = 0
    fit: Fit | None = None
    number = -1
    with open_video(path) as (container, stream):
        for number, frame in enumerate(_frames(container, stream, path)):
            if number in wanted:
                picture = _upright(frame)
                fit = fit or Fit.cover(picture.shape[:2], size)
                kept[number] = fit.picture(picture)
            while turn < len(windows) and windows[turn][-1] <= number:
                yield torch.from_numpy(np.stack([kept[index] for index in windows[turn]]))
                turn += 1
            if turn == len(windows):
                return
            for old in [index for index in kept if index < windows[turn][0]]:
                del kept[old]
    raise VideoEndError(
        f"{path}: the video ends after {number + 1} frames; frame {windows[turn][-1]} was asked for"
    )


def frame_at(start: int, count: int, ratio: float) -> int:
    """The file's frame nearest in time to the `count`-th one taken from `start`, `ratio` frames apart."""
    return start + math.floor(count * ratio + 0.5)


def write_video(
    path: str | Path,
    frames: Tensor,
    fps: float = 16,
    metadata: dict[str, str] | None = None,
    *,
    crf: int = 14,
) -> None:
    """Write uint8 RGB frames [F, H, W, 3] as mp4 (H.264, yuv420p), whole or not at all.

    Height and width must be even (4:2:0 colour): odd sizes are an error, not a silent pad. `metadata` goes to
    the file's comment as JSON and comes back from `read_metadata`. Encoded so that the same frames
    give the same bytes on every machine with the same library. Raises `WanmoeError` on wrong shapes and on a
    failed write.
    """
    path = Path(path)
    _check_frames(path, frames)
    if not (math.isfinite(fps) and fps > 0):
        raise WanmoeError(f"{path}: fps {fps} is not a positive number")
    if not path.parent.is_dir():
        raise WanmoeError(f"{path}: the folder {path.parent} does not exist; make it first")
    write_atomic(path, lambda partial: _encode(partial, frames, fps, metadata, crf), (av.FFmpegError,))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The dictionary that `write_video` put into the file, or {} where the comment is not ours."""
    with open_video(path) as (container, _):
        comment = container.metadata.get("comment", "")
    try:
        values = json.loads(comment)
    except json.JSONDecodeError:
        return {}
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}


def to_model(frames: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in [-1, 1]."""
    _check_frames("to_model", frames)
    return frames.permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_frames(video: Tensor) -> Tensor:
    """Float [3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3] on the CPU; clips, and refuses NaN."""
    if video.ndim != 4 or video.shape[0] != 3 or not video.is_floating_point():
        raise WanmoeError(f"a video in [-1, 1] is float [3, F, H, W]; got {video.dtype} {list(video.shape)}")
    video = video.detach().float().cpu()
    if not torch.isfinite(video).all():
        raise WanmoeError("the video holds NaN or infinity; nothing was written")
    return video.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read a picture as RGB uint8 [H, W, 3], scaled to cover `size` (H, W) and cut in the centre.

    Raises `WanmoeError` where the file is missing or is not a picture.
    """
    path = Path(path)
    if not path.is_file():
        raise WanmoeError(f"{path}: no such picture")
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if picture is None:
        raise WanmoeError(f"{path}: not a picture that can be decoded (png, jpg, webp, ...)")
    rgb = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    return torch.from_numpy(np.ascontiguousarray(Fit.cover(rgb.shape[:2], size).picture(rgb)))


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """A video file and its first stream of which a frame can be decoded; `WanmoeError` where it has none."""
    path = Path(path)
    if not path.is_file():  # checked here, since FFmpeg would also take URLs and pipes
        raise WanmoeError(f"{path}: no such video file")
    if path.stat().st_size == 0:
        raise WanmoeError(f"{path}: the file is empty (0 bytes)")
    index = _first_decodable(path)
    with av.open(str(path)) as container:
        stream = container.streams[index]
        assert isinstance(stream, av.VideoStream)
        stream.thread_type = "AUTO"
        yield container, stream


def _first_decodable(path: Path) -> int:
    """The index of the first video stream of which a frame can be decoded; cover pictures do not count."""
    try:
        with av.open(str(path)) as container:
            streams = [
                s.index for s in container.streams.video if not s.disposition & s.disposition.attached_pic
            ]
    except av.FFmpegError as error:
        raise WanmoeError(f"{path}: not a video that can be read: {_cause(error)}") from error
    cause = "it has no video stream"
    for index in streams:
        try:
            with av.open(str(path)) as container:
                for _ in container.decode(container.streams[index]):
                    return index
            cause = "no frame could be decoded"
        except (av.FFmpegError, LookupError) as error:  # LookupError: a codec that this build does not have
            cause = f"no frame could be decoded ({_cause(error)})"
    raise WanmoeError(f"{path}: not a video that can be read: {cause}")


def _frames(
    container: "av.container.InputContainer", stream: "av.VideoStream", path: str | Path
) -> Iterator["av.VideoFrame"]:
    number = 0
    try:
        for frame in container.decode(stream):
            yield frame
            number += 1
    except av.FFmpegError as error:
        kind = VideoDamagedError if number else WanmoeError
        raise kind(f"{path}: the video is damaged at frame {number}: {_cause(error)}") from error


def _upright(frame: "av.VideoFrame") -> Picture:
    picture = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def _rate(stream: "av.VideoStream", path: str | Path) -> float:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    if not rate:
        raise WanmoeError(
            f"{path}: the video does not say its frames a second; rewrite it with a constant rate"
        )
    return float(rate)


def _encode(path: Path, frames: Tensor, fps: float, metadata: dict[str, str] | None, crf: int) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        if metadata:
            container.metadata["comment"] = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001 * 120))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        # One thread, no macroblock tree: x264 is not deterministic otherwise (measured on 96 x 96).
        stream.options = {"crf": str(crf), "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
        # The matrix is written into the file: players guess BT.601 or BT.709 by size where it is not.
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        for picture in frames.cpu().numpy():
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _check_frames(where: str | Path, frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise WanmoeError(
            f"{where}: frames are uint8 [F, H, W, 3]; got {frames.dtype} {list(frames.shape)} "
            "(a video in [-1, 1] goes through to_frames first)"
        )
    if isinstance(where, Path) and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise WanmoeError(
            f"{where}: height and width must be even for yuv420p; got {list(frames.shape[1:3])}"
        )


def _check_range(start_frame: int, num_frames: int | None, fps: float | None) -> None:
    if start_frame < 0 or (num_frames is not None and num_frames < 1) or (fps is not None and not fps > 0):
        raise WanmoeError(
            f"start_frame {start_frame}, num_frames {num_frames}, fps {fps}: "
            "start_frame counts from 0, the other two are positive or None"
        )


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
