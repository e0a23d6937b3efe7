"""One piece to one sample: what is computed from its pictures, and what its description says."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import SURGICAL, ExpertSet
from wanmoe.moe_lora.video import read_video, to_model, write_video
from wanmoe.moe_lora.wan.codec import image_condition, load_vae
from wanmoe.moe_lora.wan.text import HashTextEncoder
from wanmoe.train.data.clips import Box, Clip, Polygon, Tip
from wanmoe.train.data.encode import PieceEncoder, encode_caption, narrow
from wanmoe.train.data.plan import Piece, Settings, files_of, make_plan, read_source

HAAR = load_vae("haar")


def textured(path: Path, frames: int = 9, size: tuple[int, int] = (64, 96), shift: int = 2) -> Path:
    """A still texture that moves to the right by `shift` pixels a frame."""
    rng = np.random.default_rng(0)
    wide = cv2.GaussianBlur(
        rng.integers(60, 255, (size[0], size[1] + shift * frames, 3), np.uint8), (0, 0), 2
    )
    pictures = [wide[:, shift * (frames - n) : shift * (frames - n) + size[1]] for n in range(frames)]
    write_video(path, torch.from_numpy(np.stack(pictures)), 25, crf=4)
    return path


def pieces(clip: Clip, **options: Any) -> list[Piece]:
    sources = {
        path: read_source(path, line, is_video=path == clip.video_path) for path, line in files_of([clip])
    }
    settings = Settings(**({"sizes": ((32, 48),), "frames": (9,), "val_fraction": 0.0} | options))
    return make_plan([clip], ExpertSet(SURGICAL), sources, settings).pieces


def pictures(piece: Piece) -> torch.Tensor:
    size = (piece.fit.height, piece.fit.width)
    return read_video(piece.clip.video_path, size=size)[list(piece.window.indices)]


def clip(path: Path, **fields: Any) -> Clip:
    return Clip(path, "the hook", id="c", source="v", origin="clips.jsonl:1", **fields)


def test_latent_and_condition_are_those_of_the_window_alone(tmp_path: Path) -> None:
    (piece,) = pieces(clip(textured(tmp_path / "v.mp4")), task="i2v")
    tensors, _ = PieceEncoder(HAAR, "i2v")(piece, pictures(piece))
    video = to_model(pictures(piece))[None]
    assert torch.equal(tensors["latent"], HAAR.encode(video)[0].half())
    condition = image_condition(HAAR, video[0, :, 0], 9)[0]
    assert torch.equal(tensors["image_latent"], condition.half())
    assert "image_latent" not in PieceEncoder(HAAR, "t2v")(piece, pictures(piece))[0]


def test_flow_border_and_region_are_on_the_grid_of_the_latent(tmp_path: Path) -> None:
    marked = clip(textured(tmp_path / "v.mp4"), boxes=(Box(0, 30, 20, 16, 16, "hook", "1"),))
    (piece,) = pieces(marked, sizes=((64, 96),))
    tensors, meta = PieceEncoder(HAAR, "t2v")(piece, pictures(piece))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    grid = (8, 12)
    assert shapes.pop("latent") == (16, 3, *grid)
    assert shapes == {"roi": (3, *grid), "picture": grid, "flow": (2, 2, *grid), "visible": (2, *grid)}
    moved = tensors["flow"][:, 0, 1:-1, 3:-1].float()
    assert float((moved + 1.0).abs().max()) < 0.2, "8 pixels to the right in four frames: from 1 cell left"
    assert tensors["picture"].min() == 255 and tensors["roi"].unique().tolist() == [0, 255]
    boxes = [(box["frame"], round(box["x"]), box["kind"], box["track"]) for box in meta["boxes"]]
    assert boxes[0] == (0, 30, "given", "1") and [box[0] for box in boxes] == list(range(9))
    assert abs(boxes[8][1] - 46) <= 2 and boxes[8][2] == "interpolated", "the box went along"


def test_a_single_frame_has_no_flow_and_an_unmarked_clip_no_region(tmp_path: Path) -> None:
    (piece, *_) = pieces(clip(textured(tmp_path / "v.mp4")), frames=(1,))
    tensors, meta = PieceEncoder(HAAR, "t2v")(piece, pictures(piece))
    assert tensors.keys() == {"latent", "picture"} and tensors["latent"].shape == (16, 1, 4, 6)
    assert meta["tips"] == meta["boxes"] == []


def test_the_description_leads_back_to_the_source(tmp_path: Path) -> None:
    marked = clip(
        textured(tmp_path / "v.mp4", frames=40, size=(64, 128)),
        tips=(Tip(15, 70.0, 41.0, "hook", "left"),),
        start_frame=11,
        phase="dissection",
        triplets=("hook,dissect,gallbladder",),
        licence="CC BY 4.0",
        caption_zh="电凝钩",
    )
    (piece,) = pieces(marked, fps=12.5)
    _, meta = PieceEncoder(HAAR, "t2v")(piece, pictures(piece))
    assert (meta["source_frames"], meta["fps"], meta["n_frames"], meta["source_fps"]) == (
        [11, 27],
        12.5,
        9,
        25,
    )
    assert (meta["phase"], meta["triplets"]) == ("dissection", ["hook,dissect,gallbladder"])
    assert (meta["licence"], meta["caption_zh"], meta["size"]) == ("CC BY 4.0", "电凝钩", [32, 48])
    tip = next(tip for tip in meta["tips"] if tip["frame"] == 2)
    assert (tip["instrument"], tip["track"], tip["kind"]) == ("hook", "left", "given")
    fit, (height, width) = meta["fit"], meta["source_size"]
    x = (tip["x"] + fit["left"] + 0.5) * width / fit["cols"] - 0.5
    y = (tip["y"] + fit["top"] + 0.5) * height / fit["rows"] - 0.5
    assert (x, y) == pytest.approx((70.0, 41.0), abs=0.01) and (height, width) == (64, 128)


def test_masks_of_the_last_clip_are_not_taken_for_the_next(tmp_path: Path) -> None:
    encoder = PieceEncoder(HAAR, "t2v")
    path = textured(tmp_path / "v.mp4")
    for number, corner in enumerate(((0, 0), (3, 5))):
        masks = np.zeros((9, 64, 96), np.uint8)
        masks[:, corner[0] * 16 : corner[0] * 16 + 8, corner[1] * 16 : corner[1] * 16 + 8] = 255
        cv2.imwrite(str(tmp_path / f"{number}.png"), masks.reshape(-1, 96))
        own = Clip(path, "x", "c", "v", f"clips.jsonl:{number}", masks=tmp_path / f"{number}.png")
        (piece,) = pieces(own)
        roi = encoder(piece, pictures(piece))[0]["roi"]
        assert roi[0].nonzero().tolist() == [list(corner)]


def test_polygons_alone_make_a_region(tmp_path: Path) -> None:
    corners = ((0.0, 0.0), (40.0, 0.0), (40.0, 30.0), (0.0, 30.0))
    (piece,) = pieces(clip(textured(tmp_path / "v.mp4"), polygons=(Polygon(0, corners, "hook"),)))
    roi = PieceEncoder(HAAR, "t2v")(piece, pictures(piece))[0]["roi"]
    assert roi[0, 0, 0] == 255 and roi[0, 3, 5] == 0 and roi[2].any()


def test_wide_values_become_fp16_and_narrow_ones_stay() -> None:
    wide = torch.tensor([1.0, 1e-3])
    assert narrow(wide, "x").dtype is torch.float16 and torch.equal(narrow(wide, "x"), wide.half())
    brain = torch.tensor([1e30]).bfloat16()
    assert narrow(brain, "x") is brain
    for wrong in (torch.tensor([1e6]), torch.tensor([float("nan")]), torch.tensor([float("inf")]).bfloat16()):
        with pytest.raises(WanmoeError, match="clips.jsonl:1: latent holds NaN, or values that"):
            narrow(wrong, "clips.jsonl:1: latent")


def test_a_caption_is_encoded_alone() -> None:
    encoder = HashTextEncoder(dim=8)
    assert encode_caption(encoder, "the hook").shape == (3, 8) and encode_caption(encoder, "").shape == (1, 8)
