"""What `wanmoe evaluate` measures and measures with: clips from files or from a run, and trained judges.

Letters: F, H, W frames, height and width in pixels, f latent frames, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from ..infer.evaluation.evaluate import Judges
from ..infer.evaluation.features import load_backbone
from ..infer.evaluation.scene import Scene
from ..moe_lora.errors import WanmoeError
from ..moe_lora.motion import clip_flow
from ..moe_lora.video import Fit, VideoInfo, frame_at, iter_windows, to_model, video_info
from ..moe_lora.wan.codec import SPACE_STRIDE, TIME_STRIDE, load_vae
from ..train.data.clip_list import SUFFIXES, clips_from_folder, read_clip_list
from ..train.data.clips import GIVEN, Box, Clip, Polygon, Tip
from ..train.data.region import MaskReader, outline, window_marks, window_region
from ..train.data.tracks import Mark
from ..train.judges.judge import LATENT, Classifier, Detector, Judge, load_classifier, load_detector
from ..train.judges.measures import FOUND
from ..train.losses_decoded import Lpips, load_lpips

if TYPE_CHECKING:
    from ..moe_lora.wan.codec import Codec

_FEWEST_FRAMES = 5  # of a clip for steadiness and flips to say something of it


def read_clips(path: Path) -> list[Clip]:
    """The clips of a `clips.jsonl`, of a folder, or the one of a video file; a label that a file name alone
    gives is none. Raises WanmoeError where there are none or two have one id."""
    if path.suffix.lower() in SUFFIXES:
        clips = [Clip(video_path=path, caption="", id=path.stem, source=path.stem, origin=str(path))]
    elif path.is_dir():
        clips = clips_from_folder(path)
        if not (path / "clips.jsonl").is_file():
            clips = [replace(clip, instruments=None) for clip in clips]
    else:
        clips = read_clip_list(path)
    seen: dict[str, str] = {}
    for clip in clips:
        if clip.id in seen:
            raise WanmoeError(
                f"{clip.origin}: the id {clip.id!r} is that of {seen[clip.id]} too; ids tell pairs"
            )
        seen[clip.id] = clip.origin
    return clips


def paired(made: Sequence[Clip], real: Sequence[Clip]) -> list[tuple[Clip, Clip | None]]:
    """Each generated clip with the real one of its id; one alone on each side belong together.

    Raises WanmoeError where no id is on both sides.
    """
    if len(made) == len(real) == 1:
        return [(made[0], real[0])]
    by_id = {clip.id: clip for clip in real}
    pairs = [(clip, by_id.get(clip.id)) for clip in made]
    if not any(found for _, found in pairs):
        raise WanmoeError(
            f"no generated clip has the id of a real one: generated are {_some(made)}, real {_some(real)}; "
            "name each generated file after the id of its clip (<id>.mp4), or list them in a clips.jsonl "
            "with these ids"
        )
    return pairs


def _some(clips: Sequence[Clip]) -> str:
    ids = [clip.id for clip in clips[:2]]
    return ", ".join(ids) + (", ..." if len(clips) > 2 else "")


def told_apart(pairs: Sequence[tuple[Clip, Clip | None]]) -> list[str]:
    """What a reader must know of pairs that are not of one shape: notes for the result. Reads every video's
    header, so that one that is none is found before anything is measured (WanmoeError)."""
    faster: list[str] = []
    lengths: list[str] = []
    shapes: list[str] = []
    short: list[str] = []
    lost: list[str] = []
    for made, real in pairs:
        own = video_info(made.video_path)
        if own.frames < _FEWEST_FRAMES:
            short.append(made.id)
        lost += [made.origin] if _all_outside(made, own) else []
        if real is None:
            continue
        other = video_info(real.video_path)
        lost += [real.origin] if _all_outside(real, other) else []
        seconds = ((real.num_frames or other.frames - real.start_frame) / other.fps, own.frames / own.fps)
        if own.fps > 1.01 * other.fps:
            faster.append(made.id)
        if abs(seconds[0] - seconds[1]) > 1 / other.fps + 1 / own.fps:
            lengths.append(made.id)
        if abs(own.width * other.height - own.height * other.width) > own.height * other.height / 50:
            shapes.append(made.id)
    told = {
        "have more frames a second than their real ones, of which frames are shown twice: real ones look "
        "steadier than they are": faster,
        "are of another length than their real ones: what both have is compared": lengths,
        "are of another shape than their real ones, which are scaled to cover them and cut in the "
        "centre": shapes,
        f"have fewer than {_FEWEST_FRAMES} frames: steadiness and flips say little of them": short,
    }
    notes = [
        f"{len(ids)} of {len(pairs)} generated clips {what} ({', '.join(ids[:3])}{', ...' * (len(ids) > 3)})"
        for what, ids in told.items()
        if ids
    ]
    if lost:
        notes.append(
            f"no tip or no box of {lost[0]} lies in its frames and its picture"
            + (f", nor of {len(lost) - 1} other clips" if lost[1:] else "")
            + ": they are left out; frames count from the beginning of the file, pixels are the file's"
        )
    return notes


def _all_outside(clip: Clip, info: VideoInfo) -> bool:
    """Whether tips or boxes are given of which none can be seen in the clip."""
    end = min(info.frames, clip.start_frame + (clip.num_frames or info.frames))

    def seen(mark: Tip | Box) -> bool:
        return (
            clip.start_frame <= mark.frame < end
            and -0.5 <= mark.x < info.width
            and -0.5 <= mark.y < info.height
        )

    return any(marks and not any(map(seen, marks)) for marks in (clip.tips, clip.boxes))


def scenes(pairs: Sequence[tuple[Clip, Clip | None]]) -> Iterator[tuple[Scene, Scene | None]]:
    """The clips as they are measured, read one pair at a time: the real one at the size and rate of the
    generated one, and no longer than it. Sides that are no multiple of 8 lose what is over.

    Raises WanmoeError for a video or mask that cannot be read.
    """
    masks = MaskReader()
    for made, real in pairs:
        info = video_info(made.video_path)
        size = info.height // SPACE_STRIDE * SPACE_STRIDE, info.width // SPACE_STRIDE * SPACE_STRIDE
        if min(size) < 2 * SPACE_STRIDE:
            raise WanmoeError(
                f"{made.video_path}: {info.width} x {info.height} pixels are too few to measure"
            )
        own = _scene(made, info, size, info.fps, None, masks)
        other = None
        if real is not None:
            shown = video_info(real.video_path)
            other = _scene(real, shown, size, info.fps, len(own.frames), masks)
        yield own, other


def _scene(
    clip: Clip, info: VideoInfo, size: tuple[int, int], fps: float, most: int | None, masks: MaskReader
) -> Scene:
    end = min(info.frames, clip.start_frame + (clip.num_frames or info.frames))
    indices: list[int] = []
    while (at := frame_at(clip.start_frame, len(indices), info.fps / fps)) < end and len(indices) != most:
        indices.append(at)
    if not indices:
        raise WanmoeError(f"{clip.origin}: it begins with frame {clip.start_frame} of {info.frames}")
    (frames,) = iter_windows(clip.video_path, [indices], size)
    fit = Fit.cover((info.height, info.width), size)
    stored = masks(clip, info.height, info.width)
    marked = stored is not None or clip.tips or clip.boxes or clip.polygons
    flow = clip_flow(frames.contiguous()) if marked and len(frames) > 1 else None
    marks = window_marks(clip, indices, fit, flow)
    region = window_region(clip, indices, fit, stored, marks, flow)
    tips, boxes = _given(marks.tips, len(indices)), _given(marks.boxes, len(indices))
    return Scene(
        id=clip.id,
        frames=frames,
        fps=fps,
        label=clip.instruments or (),
        caption=clip.caption,
        tips=_by_frame([[(tip.x, tip.y) for tip in own] for own in tips]),
        boxes=_by_frame([[(box.x, box.y, box.width, box.height) for box in own] for own in boxes]),
        masks=_masks(clip, indices, fit, stored),
        where=() if region is None else tuple(region > 0),
    )


def _given(marks: Sequence[Mark], frames: int) -> list[list[Mark]]:
    """The marks of each frame that somebody made: what was carried there by flow is no truth."""
    out: list[list[Mark]] = [[] for _ in range(frames)]
    for mark in marks:
        if mark.kind == GIVEN:
            out[mark.frame].append(mark)
    return out


def _by_frame(marks: Sequence[Sequence[tuple[float, ...]]]) -> tuple[Tensor | None, ...]:
    """Tensors by frame, None where nothing is marked; () where nothing is at all."""
    if not any(marks):
        return ()
    return tuple(torch.tensor(own, dtype=torch.float64) if own else None for own in marks)


def _masks(
    clip: Clip, indices: Sequence[int], fit: Fit, stored: Mapping[int, np.ndarray] | None
) -> tuple[Tensor | None, ...]:
    """Instances by frame: polygons by their track, else the separate parts of the mask."""
    drawn = {index: [p for p in clip.polygons if p.frame == index] for index in indices}
    if stored is None and not any(drawn.values()):
        return ()
    out: list[Tensor | None] = []
    for index in indices:
        parts: list[np.ndarray] | None = None
        if drawn[index]:
            tracks: dict[tuple[str, str], list[Polygon]] = {}
            for polygon in drawn[index]:
                tracks.setdefault((polygon.instrument, polygon.track), []).append(polygon)
            parts = [outline(own, fit) for own in tracks.values()]
        elif stored is not None and index in stored:
            parts = _separate(fit.picture(stored[index], nearest=True))
        if parts is None:
            out.append(None)
        else:
            empty = np.zeros((0, fit.height, fit.width), np.uint8)
            out.append(torch.from_numpy(np.stack(parts) if parts else empty) > 0)
    return tuple(out)


def _separate(mask: np.ndarray) -> list[np.ndarray]:
    count, labels = cv2.connectedComponents(mask)
    return [(labels == number).astype(np.uint8) for number in range(1, count)]


def open_judges(
    classifier: Path | None,
    detector: Path | None,
    vae: str | None,
    lpips: Path | None,
    features: str | None,
    device: torch.device,
) -> Judges:
    """The judges of `wanmoe evaluate` from their files.

    Raises WanmoeError for a file that is none of its kind, and for a judge of latents without the codec that
    made those it was trained on.
    """
    judge = None if classifier is None else load_classifier(classifier, device)
    finder = None if detector is None else load_detector(detector, device)
    wanted = [one for one in (judge, finder) if one is not None and one.info.space == LATENT]
    codec = None if vae is None else load_vae(vae, device=device)
    for one in wanted:
        _check_codec(one, codec, vae)
    look = _Look(codec, judge, finder, device)
    return Judges(
        classify=None if judge is None else look.classify,
        moments=None if judge is None else look.moments,
        targets=None if judge is None else look.targets,
        classes=() if judge is None else judge.classes,
        find_tips=None if finder is None else look.find_tips,
        lpips=None if lpips is None else _placed(load_lpips(lpips), device),
        backbone=None if features is None else load_backbone(features, device),
        device=device,
    )


def _placed(lpips: Lpips, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    net = lpips.to(device)

    @torch.no_grad()
    def apart(one: Tensor, other: Tensor) -> Tensor:
        found: Tensor = net(one.to(device), other.to(device))
        return found.cpu()

    return apart


def _check_codec(judge: Judge, codec: Codec | None, vae: str | None) -> None:
    own = judge.info.codec
    if codec is None:
        raise WanmoeError(
            f"{judge.origin}: it judges latents of codec {own['name']}; give that codec with --vae"
        )
    if codec.fingerprint != own["fingerprint"]:
        raise WanmoeError(
            f"--vae {vae}: {judge.origin} judges latents of codec {own['name']} "
            f"({own['fingerprint'][:12]}), and this is another ({codec.fingerprint[:12]})"
        )


class _Look:
    """Pictures as judges take them; the latent of the last clip is kept, for each judge asks for it."""

    def __init__(
        self, codec: Codec | None, judge: Classifier | None, finder: Detector | None, device: torch.device
    ) -> None:
        self.codec, self.judge, self.finder, self.device = codec, judge, finder, device
        self._last: tuple[Tensor, Tensor] | None = None

    def targets(self, label: Sequence[tuple[str, float]]) -> Tensor:
        """[K]; all 0 for a label without one of the classes."""
        assert self.judge is not None
        known = [(name, weight) for name, weight in label if self._knows(name)]
        return self.judge.targets(known)

    def _knows(self, name: str) -> bool:
        assert self.judge is not None
        try:
            self.judge.experts.index(name)
        except WanmoeError:
            return False
        return True

    @torch.no_grad()
    def classify(self, frames: Tensor) -> Tensor:
        """[K] of a clip uint8 [F, H, W, 3]."""
        assert self.judge is not None
        return self.judge(self._seen(frames, self.judge.space))[0].cpu()

    @torch.no_grad()
    def moments(self, frames: Tensor) -> Tensor:
        """[f, K]: each latent frame by itself, or each picture in four."""
        assert self.judge is not None
        seen = self._seen(frames, self.judge.space)
        step = 1 if self.judge.space == LATENT else TIME_STRIDE
        alone = seen[0, :, ::step].transpose(0, 1)[:, :, None]
        return torch.cat([self.judge(part) for part in alone.split(8)]).cpu()

    @torch.no_grad()
    def find_tips(self, frames: Tensor) -> tuple[Tensor | None, ...]:
        """The likeliest tip of every fourth frame, if there is one."""
        assert self.finder is not None
        tips = self.finder.tips(self._seen(frames, LATENT))[0].cpu().double()
        out: list[Tensor | None] = [None] * len(frames)
        for place, (x, y, sure) in enumerate(tips):
            found = sure >= FOUND
            out[place * TIME_STRIDE] = torch.stack([x, y])[None] if found else torch.zeros(0, 2).double()
        return tuple(out)

    def _seen(self, frames: Tensor, space: str) -> Tensor:
        length = (len(frames) - 1) // TIME_STRIDE * TIME_STRIDE + 1
        if space != LATENT:
            return to_model(frames[:length])[None].to(self.device)
        if self._last is None or self._last[0] is not frames:
            assert self.codec is not None
            self._last = frames, self.codec.encode(to_model(frames[:length])[None].to(self.device))
        return self._last[1]
