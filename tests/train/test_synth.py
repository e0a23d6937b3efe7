"""Synthetic scenes: deterministic, balanced, exact in what they claim, and different from one instrument to
the next."""

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import SURGICAL, ExpertSet
from wanmoe.moe_lora.video import read_video
from wanmoe.train.synth import synth_clips
from wanmoe.train.synth_captions import _CHINESE, _ENGLISH
from wanmoe.train.synth_scene import Scene, draw_scene
from wanmoe.train.synth_tools import TOOLS


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(folder: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sha.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return sha.hexdigest()


def scene(tool: int, seed: int = 0) -> Scene:
    return draw_scene([TOOLS[tool]], np.random.default_rng(seed), frames=9, height=96, width=96)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synth_clips(tmp_path / name, clips=8, val=4, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_splits_are_balanced_and_share_no_source(tmp_path: Path) -> None:
    listing = rows(synth_clips(tmp_path / "s", clips=16, val=8, frames=5, height=48, width=64))
    for split, each in (("train", 4), ("val", 2)):
        labels = [row["instrument_label"] for row in listing if row["split"] == split]
        assert [labels.count(label) for label in range(4)] == [each] * 4
    sources = {
        split: {row["source"] for row in listing if row["split"] == split} for split in ("train", "val")
    }
    assert not sources["train"] & sources["val"]
    names = [expert.name for expert in SURGICAL]
    assert all(
        row["instruments"] == [{"name": names[row["instrument_label"]], "weight": 1.0}] for row in listing
    )
    chinese = [(row["instrument_label"], row["caption"] == row["caption_zh"]) for row in listing]
    assert len(set(chinese)) == 8, "every instrument has captions in both languages"


def test_truth_fits_the_pixels(tmp_path: Path) -> None:
    path = synth_clips(tmp_path / "s", clips=4, val=4)
    for row in rows(path):
        video = read_video(path.parent / row["video_path"])
        assert video.shape == (17, 96, 96, 3) and row["num_frames"] == 17
        masks = cv2.imread(str(path.parent / row["masks"]), cv2.IMREAD_GRAYSCALE)
        assert masks is not None and masks.shape == (17 * 96, 96) and set(np.unique(masks)) == {0, 255}
        masks = masks.reshape(17, 96, 96)
        assert 0.03 < float((masks > 0).mean()) < 0.3
        for mask, (_, x, y), (_, left, top, width, height) in zip(
            masks, row["tips"], row["boxes"], strict=True
        ):
            ys, xs = np.nonzero(mask)
            assert (left, top) == (xs.min(), ys.min())
            assert (left + width - 1, top + height - 1) == (xs.max(), ys.max())
            assert 0 <= x < 96 and 0 <= y < 96
            near = np.hypot(xs - x, ys - y).min()
            assert near < (20 if row["instrument_label"] in (0, 3) else 2.5), (
                "between open jaws, else on the metal"
            )


def test_the_instrument_is_in_the_picture_where_the_mask_says() -> None:
    for number, tool in enumerate(TOOLS):
        with_tool = scene(number)
        drawn = draw_scene([tool], np.random.default_rng(0), frames=9, height=96, width=96)
        assert np.array_equal(drawn.frames, with_tool.frames)
        ground = draw_scene([], np.random.default_rng(0), frames=9, height=96, width=96)
        change = np.abs(with_tool.frames.astype(int) - ground.frames.astype(int)).sum(-1)
        inside = with_tool.masks > 0
        assert change[inside].mean() > 4 * change[~inside].mean()
        assert not ground.masks.any() and not ground.tips and ground.sides == ()


def test_instruments_differ_in_colour_and_in_motion() -> None:
    colours, along, across = [], [], []
    for tool in range(len(TOOLS)):
        scenes = [scene(tool, seed) for seed in range(6)]
        colours.append(np.mean([s.frames[s.masks > 0].mean(0) for s in scenes], axis=0))
        tips = np.array([[tip[1:] for tip in s.tips] for s in scenes])
        steps = np.diff(tips, axis=1)
        sideways = np.array([s.sides[0] in ("top", "bottom") for s in scenes])
        along.append(np.mean([np.abs(st[:, int(v)]).sum() for st, v in zip(steps, sideways, strict=True)]))
        across.append(
            np.mean([np.abs(st[:, 1 - int(v)]).sum() for st, v in zip(steps, sideways, strict=True)])
        )
    apart = [np.abs(a - b).max() for i, a in enumerate(colours) for b in colours[:i]]
    assert min(apart) > 15
    assert across[1] > 2 * along[1], "the hook sweeps"
    assert along[2] > 2 * across[2], "the suction tube probes"


def test_captions_name_their_instrument_and_no_other() -> None:
    experts = ExpertSet(SURGICAL)
    for table, sides in ((_ENGLISH, ("left", "bottom")), (_CHINESE, ("左侧", "下方"))):
        for name, phrases in table.items():
            assert len(set(phrases)) >= 4
            for text in (phrase.format(side=side) for phrase in phrases for side in sides):
                assert set(experts.find(text)) == ({name} if name else set()), text


def test_scenes_without_instruments(tmp_path: Path) -> None:
    path = synth_clips(tmp_path / "s", clips=6, val=2, instruments=0)
    for row in rows(path):
        assert row["instruments"] == [] and "tips" not in row and "instrument_label" not in row
        assert not ExpertSet(SURGICAL).find(row["caption_en"] + row["caption_zh"])
        video = read_video(path.parent / row["video_path"]).float()
        assert float((video[0] - video[-1]).abs().mean()) > 1, "the background moves"
    assert not (path.parent / "masks").exists()


def test_a_given_background_is_seen(tmp_path: Path, data_dir: Path) -> None:
    path = synth_clips(
        tmp_path / "s", clips=2, val=2, instruments=0, background=data_dir / "surgical/endo.mp4"
    )
    real = read_video(data_dir / "surgical/endo.mp4", size=(96, 96), num_frames=20).float().mean((0, 1, 2))
    for row in rows(path):
        mine = read_video(path.parent / row["video_path"]).float().mean((0, 1, 2))
        assert float(mine[0]) > float(mine[1]) and float((mine - real).abs().max()) < 60


def test_other_sizes_and_wrong_arguments(tmp_path: Path) -> None:
    listing = rows(synth_clips(tmp_path / "s", clips=4, val=0, height=64, width=112, frames=5))
    assert read_video(tmp_path / "s" / listing[0]["video_path"]).shape == (5, 64, 112, 3)
    for wrong in (
        {"height": 95},
        {"clips": 0},
        {"seed": -1},
        {"instruments": 3},
        {"background": tmp_path / "none.mp4"},
    ):
        with pytest.raises(WanmoeError):
            synth_clips(tmp_path / "t", **{"clips": 1, "val": 0, **wrong})  # type: ignore[arg-type]
    assert not (tmp_path / "t").exists()


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(WanmoeError, match=r"thesis\.txt"):
        synth_clips(tmp_path / "mine", clips=1, val=0)
    synth_clips(tmp_path / "s", clips=2, val=0)
    synth_clips(tmp_path / "s", clips=1, val=0)
    assert len(list((tmp_path / "s" / "videos").iterdir())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "s"}


def test_scenes_of_two_instruments_show_both(tmp_path: Path) -> None:
    path = synth_clips(tmp_path / "s", clips=6, val=6, instruments=2, frames=5)
    pairs = set()
    for row in rows(path):
        names = [instrument["name"] for instrument in row["instruments"]]
        pairs.add((row["split"], *names))
        assert [instrument["weight"] for instrument in row["instruments"]] == [0.5, 0.5]
        assert "instrument_label" not in row
        for caption in (row["caption_en"], row["caption_zh"]):
            assert set(ExpertSet(SURGICAL).find(caption)) == set(names)
        assert (
            [tip[0] for tip in row["tips"]]
            == [box[0] for box in row["boxes"]]
            == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        )
    assert len(pairs) == 12, "each pair in each split"
    two = draw_scene([TOOLS[0], TOOLS[2]], np.random.default_rng(3), frames=5, height=96, width=96)
    one = draw_scene([TOOLS[0]], np.random.default_rng(3), frames=5, height=96, width=96)
    assert len(set(two.sides)) == 2 and two.sides[0] == one.sides[0]
    assert two.tips[::2] == one.tips and two.boxes[::2] == one.boxes
    assert np.all(two.masks[one.masks > 0] == 255) and (two.masks > 0).sum() > 1.2 * (one.masks > 0).sum()
