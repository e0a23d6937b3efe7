"""Synthetic scenes: drawn instruments over a moving background, with exact tips, boxes, masks, labels and
captions.

They are what tests, demo and ablations measure against. They look like a cartoon of surgery and claim no
more.
"""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from ..moe_lora.errors import WanmoeError
from ..moe_lora.video import read_video, video_info, write_video
from .staging import staged_folder
from .synth_captions import captions
from .synth_scene import Scene, draw_scene
from .synth_tools import TOOLS, Tool

_SLUGS = ("scissors", "hook", "suction", "other")
_FOOTAGE_FRAMES = 1000  # of a given background: kept in memory at the scenes' own size


def synth_clips(
    out: str | Path,
    *,
    clips: int = 160,
    val: int = 48,
    height: int = 96,
    width: int = 96,
    frames: int = 17,
    fps: float = 16,
    seed: int = 0,
    instruments: int = 1,
    background: str | Path | None = None,
) -> Path:
    """Draw `clips` training and `val` held-out scenes; returns the path of `clips.jsonl`.

    The same arguments give the same bytes. `instruments` is how many a scene has, 0 to 2: 0 draws the
    background alone, two come from different sides. They (or their six pairs) take turns, so every split has
    each equally often. `background` is a video whose frames replace the
    drawn tissue (its first 1000 frames at `fps`; the last quarter of them for the held-out scenes alone,
    where it is long enough). Writes `videos/*.mp4` and `masks/*.png` (the frames' masks stacked vertically).
    A former result at `out` is replaced, a folder with other files never is. Raises `WanmoeError` on sizes
    that cannot be and on a failed write.
    """
    if min(clips, frames) < 1 or val < 0 or seed < 0 or not fps > 0:
        raise WanmoeError(
            f"synth: clips and frames are 1 or more, val and seed 0 or more, fps positive; "
            f"got clips {clips}, val {val}, frames {frames}, seed {seed}, fps {fps}"
        )
    if instruments not in (0, 1, 2):
        raise WanmoeError(f"synth: a scene has 0, 1 or 2 instruments; got {instruments}")
    if min(height, width) < 32 or height % 2 or width % 2:
        raise WanmoeError(f"synth: height and width are even and 32 or more; got {height} x {width}")
    footage = _read_footage(background, frames, fps, height, width) if background is not None else {}
    turns = list(combinations(TOOLS, instruments))
    with staged_folder(out, lambda name: name in ("clips.jsonl", "videos", "masks")) as folder:
        (folder / "videos").mkdir()
        if instruments:
            (folder / "masks").mkdir()
        with (folder / "clips.jsonl").open("w", encoding="utf-8") as listing:
            scenes = [("train", number) for number in range(clips)] + [
                ("val", number) for number in range(val)
            ]
            for split, number in scenes:
                rng = np.random.default_rng([seed, split == "val", number, instruments])
                tools = turns[number % len(turns)]
                scene = draw_scene(
                    tools, rng, frames=frames, height=height, width=width, footage=footage.get(split)
                )
                row = _row(scene, tools, number, len(turns), split, seed, rng)
                _write(folder, row, scene, fps)
                listing.write(json.dumps(row, ensure_ascii=False) + "\n")
    return Path(out) / "clips.jsonl"


def _row(
    scene: Scene,
    tools: Sequence[Tool],
    number: int,
    turns: int,
    split: str,
    seed: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The line of `clips.jsonl` of one scene."""
    names = [tool.name for tool in tools]
    said = [captions(name, side, rng) for name, side in zip(names or [""], scene.sides or [""], strict=True)]
    english, chinese = " ".join(one for one, _ in said), "".join(one for _, one in said)
    kind = "-".join(_SLUGS[TOOLS.index(tool)] for tool in tools) or "tissue"
    stem = f"{split}-{number:04d}-{kind}"
    # The language changes once every instrument has had its turn: by clip it would follow the instrument.
    in_chinese = number // turns % 2 == 1
    row: dict[str, Any] = {
        "id": stem,
        "video_path": f"videos/{stem}.mp4",
        "caption": chinese if in_chinese else english,
        "caption_en": english,
        "caption_zh": chinese,
        "instruments": [{"name": name, "weight": 1 / len(names)} for name in names],
        "source": f"synth{seed}-{split}-{number:04d}",
        "split": split,
        "num_frames": len(scene.frames),
    }
    if len(tools) == 1:
        row["instrument_label"] = TOOLS.index(tools[0])
    if tools:
        row["tips"] = [list(tip) for tip in scene.tips]
        row["boxes"] = [list(box) for box in scene.boxes]
        row["masks"] = f"masks/{stem}.png"
    return row


def _write(folder: Path, row: dict[str, Any], scene: Scene, fps: float) -> None:
    write_video(folder / row["video_path"], torch.from_numpy(scene.frames), fps, {"synthetic": row["id"]})
    if "masks" in row:
        ok, png = cv2.imencode(".png", scene.masks.reshape(-1, scene.masks.shape[-1]))
        if not ok:
            raise WanmoeError(f"{folder / row['masks']}: the mask could not be encoded as PNG")
        (folder / row["masks"]).write_bytes(png.tobytes())


def _read_footage(
    path: str | Path, frames: int, fps: float, height: int, width: int
) -> dict[str, NDArray[np.uint8]]:
    """The user's background for each split, a quarter larger than the picture: each scene is another cut."""
    info = video_info(path)
    length = min(_FOOTAGE_FRAMES, int((info.frames - 1) * fps / info.fps) + 1)
    pictures: NDArray[np.uint8] = read_video(
        path, fps=fps, size=(height * 5 // 4, width * 5 // 4), num_frames=length
    ).numpy()
    cut = length * 3 // 4
    if length - cut < frames:  # too short to hold a part back: both splits run over all of it
        return {"train": pictures, "val": pictures}
    return {"train": pictures[:cut], "val": pictures[cut:]}
