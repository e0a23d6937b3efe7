"""Clips to shards, with small stand-ins: latents, labels, regions and splits are what the clips say."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import SURGICAL, Expert, ExpertSet
from wanmoe.moe_lora.video import Fit, read_video, to_model, write_video
from wanmoe.moe_lora.wan.codec import load_vae
from wanmoe.moe_lora.wan.text import HashTextEncoder
from wanmoe.train.data.clip_list import clips_from_folder, read_clip_list
from wanmoe.train.data.clips import Clip, instrument_names
from wanmoe.train.data.prepare import label, prepare
from wanmoe.train.data.region import latent_region, pool, window_tips
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.data.verify import verify_shards
from wanmoe.train.synth import synth_clips

EXPERTS = ExpertSet(SURGICAL)


class MeanCodec:
    """Means over the cells of the latent grid, repeated to 16 channels."""

    name, fingerprint, stand_in = "mean", "mean-1", True

    def encode(self, video: Tensor) -> Tensor:
        cells = video.unflatten(3, (-1, 8)).unflatten(5, (-1, 8)).mean((4, 6))
        rest = cells[:, :, 1:].unflatten(2, (-1, 4)).mean(3)
        return torch.cat([cells[:, :, :1], rest], dim=2).repeat(1, 6, 1, 1, 1)[:, :16]

    def decode(self, latent: Tensor) -> Tensor:
        raise NotImplementedError


def run(clips: list[Clip], out: Path, **options: Any) -> dict[str, Any]:
    options = {"experts": EXPERTS, "size": (32, 48), "frames": 9, "progress": False, **options}
    return prepare(clips, out, codec=MeanCodec(), text_encoder=HashTextEncoder(dim=16), **options)


def video(path: Path, frames: int = 20, seed: int = 0, size: tuple[int, int] = (32, 48)) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, 4, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    write_video(path, (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), 16)
    return path


def listed(folder: Path, *rows: dict[str, Any]) -> list[Clip]:
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_clip_list(path)


def test_a_sample_holds_the_latent_and_text_of_its_clip(tmp_path: Path) -> None:
    clips = read_clip_list(synth_clips(tmp_path / "c", clips=4, val=4, height=32, width=48, frames=9))
    manifest = run(clips, tmp_path / "s")
    assert manifest["n_samples"] == {"train": 4, "val": 4}
    each = {name: 1.0 for name in EXPERTS.names}
    assert manifest["histogram"] == {"train": each, "val": each}
    assert (
        manifest["normalised"] is True and manifest["codec"]["name"] == "mean" and manifest["task"] == "t2v"
    )
    data, by_source = ShardDataset(tmp_path / "s", "val"), {clip.source: clip for clip in clips}
    for index in range(len(data)):
        sample = data[index]
        clip = by_source[sample.meta["source"]]
        expected = MeanCodec().encode(to_model(read_video(clip.video_path))[None])[0]
        assert torch.allclose(sample.latent.float(), expected, atol=1e-3)
        assert sample.caption == clip.caption and sample.instruments == clip.instruments
        assert sample.context.shape[1] == 16 and sample.context.abs().sum() > 0
        assert sample.roi is not None and 0 < float(sample.roi.mean()) < 1
        assert clip.split == "val" and sample.meta["tips"] == [list(tip[:3]) for tip in clip.tips]
        assert sample.meta["fps"] == 16 and sample.meta["n_frames"] == 9 and sample.meta["size"] == [32, 48]
    assert verify_shards(tmp_path / "s").ok


def test_a_rebuild_is_identical_wherever_the_clips_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        clips = read_clip_list(synth_clips(tmp_path / name / "clips", clips=4, val=2, frames=9))
        run(clips, tmp_path / name / "s", batch_size=3)
    for path in (tmp_path / "a" / "s").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "s" / path.name).read_bytes(), path.name


def test_equal_names_in_two_folders_do_not_collide(tmp_path: Path) -> None:
    video(tmp_path / "x" / "scissors_1.mp4", seed=1)
    video(tmp_path / "y" / "scissors_1.mp4", seed=2)
    row = {"caption": "Scissors cut.", "source": "v", "id": "c"}
    clips = listed(
        tmp_path, *({**row, "video_path": f"{name}/scissors_1.mp4", "num_frames": 9} for name in "xy")
    )
    run(clips, tmp_path / "s", val_fraction=0.0)
    data = ShardDataset(tmp_path / "s")
    assert len(data) == len(set(data.keys)) == 2 and all(key.startswith("v_c-w000_") for key in data.keys)
    assert not torch.allclose(data[0].latent, data[1].latent, atol=0.05)
    assert all("." not in key for key in data.keys)


def test_labels_come_first_from_fields_then_tools_then_words(tmp_path: Path) -> None:
    base = {"video_path": "v.mp4", "caption": "The hook and the suction tube."}
    got = [
        label(clip, EXPERTS)
        for clip in listed(
            tmp_path,
            {**base, "instruments": ["scissors"], "instrument_label": 3},
            {**base, "instruments": []},
            {**base, "instrument_label": 3},
            {**base, "caption": "The hook [Tools in: scissors, grasper]"},
            base,
            {**base, "caption": "电凝钩烧灼，电凝钩退出，剪刀进入。"},
            {**base, "caption": "Fat.", "caption_zh": "吸引器"},
            {**base, "caption": "The camera moves."},
        )
    ]
    assert got == [
        (("Scissors", 1.0),),
        (),
        (("Other", 1.0),),
        (("Scissors", 0.5), ("Other", 0.5)),
        (("Hook/Electrocautery", 0.5), ("Suction", 0.5)),
        (("Scissors", 0.25), ("Hook/Electrocautery", 0.75)),
        (("Suction", 1.0),),
        (),
    ]


def test_an_unknown_label_names_the_line(tmp_path: Path) -> None:
    video(tmp_path / "v.mp4")
    base = {"video_path": "v.mp4", "caption": "x"}
    for wrong, cause in (
        ({"instruments": ["Scisors"]}, "unknown expert 'Scisors'; nearest is 'Scissors'"),
        ({"instrument_label": 4}, "instrument_label is 4"),
    ):
        with pytest.raises(WanmoeError, match=cause) as caught:
            run(listed(tmp_path, base, {**base, **wrong}), tmp_path / "s")
        assert "clips.jsonl:2: " in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_short_clips_are_dropped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video(tmp_path / "long.mp4", frames=20)
    video(tmp_path / "short.mp4", frames=8, seed=3)
    rows = [{"video_path": name, "caption": "a hook"} for name in ("long.mp4", "short.mp4", "long.mp4")]
    manifest = run(listed(tmp_path, *rows), tmp_path / "s", val_fraction=0.0, progress=True)
    assert manifest["n_samples"] == {"train": 2}
    assert manifest["dropped"] == {
        "clip shorter than 9 frames at its own rate": 1,
        "the same window and caption twice": 2,
    }
    told = capsys.readouterr().err
    assert "dropped 1: clip shorter" in told and "clips.jsonl:2" in told and "kept 2 train" in told
    assert "stand-ins, not the real models: mean, hash" in told
    with pytest.raises(WanmoeError, match="no sample is left of 3 clips: 3 x clip shorter than 33 frames"):
        run(listed(tmp_path, *rows), tmp_path / "t", frames=33)
    assert not (tmp_path / "t").exists()


def test_windows_of_the_two_splits_share_no_frame(tmp_path: Path) -> None:
    video(tmp_path / "v.mp4", frames=40)
    (tmp_path / "copy.mp4").write_bytes(
        (tmp_path / "v.mp4").read_bytes()
    )  # the same video under another name
    base = {"caption": "a hook", "video_path": "v.mp4"}
    rows = [
        {**base, "split": "train", "num_frames": 20},
        {**base, "split": "val", "start_frame": 15, "num_frames": 20},
        {**base, "split": "val", "video_path": "copy.mp4", "num_frames": 12},
    ]
    manifest = run(listed(tmp_path, *rows), tmp_path / "s", window_stride=4)
    assert manifest["dropped"] == {"held-out window shares frames with training": 2}
    spans: dict[str, set[int]] = {}
    for split in ("train", "val"):
        data = ShardDataset(tmp_path / "s", split)
        for index in range(len(data)):
            first, last = data[index].meta["source_frames"]
            spans.setdefault(split, set()).update(range(first, last + 1))
    assert spans["train"] and spans["val"] and not spans["train"] & spans["val"]


def test_a_single_video_per_label_gives_held_out_moments(tmp_path: Path) -> None:
    for seed, name in enumerate(("again", "milk")):
        video(tmp_path / "c" / f"{name}.mp4", frames=40, seed=seed)
    clips = clips_from_folder(tmp_path / "c")
    experts = ExpertSet([Expert(name=name) for name in instrument_names(clips)])
    manifest = run(clips, tmp_path / "s", experts=experts, window_stride=4)
    assert manifest["notes"] == ["held-out moments, not held-out videos, for 2 labels: again, milk"]
    assert manifest["histogram"]["val"] == {"again": 1.0, "milk": 1.0}
    assert manifest["histogram"]["train"]["milk"] > 2 and manifest["experts"] == ["again", "milk"]
    assert verify_shards(tmp_path / "s").shared_sources == ["again", "milk"]


def test_i2v_stores_the_condition_on_the_first_frame(tmp_path: Path) -> None:
    video(tmp_path / "v.mp4", frames=9)
    run(listed(tmp_path, {"video_path": "v.mp4", "caption": "x"}), tmp_path / "s", task="i2v")
    sample = ShardDataset(tmp_path / "s")[0]
    assert sample.image_latent is not None and sample.image_latent.shape == (20, 3, 4, 6)
    assert sample.image_latent[:4, 0].unique().tolist() == [1.0]
    assert not sample.image_latent[:4, 1:].any()
    assert torch.allclose(sample.image_latent[4:, 0], sample.latent[:, 0], atol=1e-3)
    assert not sample.image_latent[4:, 1:].any(), "grey frames are 0 in [-1, 1]"


@pytest.mark.gpu
def test_a_gpu_makes_the_same_shards(tmp_path: Path) -> None:
    clips = read_clip_list(synth_clips(tmp_path / "c", clips=4, val=2, height=32, width=48, frames=9))
    options: dict[str, Any] = {"experts": EXPERTS, "size": (32, 48), "frames": 9, "progress": False}
    for device in ("cpu", "cuda"):
        encoder = HashTextEncoder(dim=16).to(device)
        prepare(
            clips, tmp_path / device, codec=load_vae("haar", device=device), text_encoder=encoder, **options
        )
    assert verify_shards(tmp_path / "cuda").ok
    cpu, cuda = ShardDataset(tmp_path / "cpu"), ShardDataset(tmp_path / "cuda")
    for index in range(len(cpu)):
        assert torch.allclose(cuda[index].latent, cpu[index].latent, atol=5e-3)
        assert torch.equal(cuda[index].context, cpu[index].context)


def test_what_encoders_give_leaves_their_device_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts are kept for captions to come: on the encoder's device they would pile up."""
    moved: list[torch.Size] = []
    real = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (moved.append(tensor.shape), real(tensor))[1])
    clip = {"video_path": str(video(tmp_path / "v.mp4", 9)), "caption": "The hook."}
    run(listed(tmp_path, clip), tmp_path / "s", val_fraction=0.0)
    latent, context = ShardDataset(tmp_path / "s")[0].latent, ShardDataset(tmp_path / "s")[0].context
    assert torch.Size([1, *latent.shape]) in moved and context.shape in moved


def test_the_region_pools_cells_and_groups_of_four() -> None:
    masks = torch.zeros(9, 16, 24, dtype=torch.uint8)
    masks[0, 0, 0] = 255
    masks[4, 15, 23] = 255  # the last frame of the first group
    masks[5, 8, 7] = 255  # the first of the second
    expected = torch.zeros(3, 2, 3, dtype=torch.uint8)
    expected[0, 0, 0] = expected[1, 1, 2] = expected[2, 1, 0] = 255
    assert torch.equal(pool(masks), expected)


def test_annotations_follow_the_scaling_and_the_cut() -> None:
    fit = Fit.cover((64, 128), (32, 32))  # half the size, then the middle half of the width
    base = {"video_path": Path("v"), "caption": "", "id": "", "source": "", "origin": ""}
    tips = ((0.0, 64.5, 32.5), (4.0, 64.5, 40.5), (8.0, 5.0, 5.0))
    clip = Clip(**base, tips=tips)  # type: ignore[arg-type]
    rows = window_tips(clip, list(range(9)), fit)
    assert rows[0] == (0, 16.0, 16.0) and rows[4] == (4, 16.0, 20.0), "frame 8's tip is cut away"
    assert rows[2] == (2, 16.0, 18.0), "gaps are filled linearly"
    region = latent_region(clip, [0, 1, 2, 3, 4], fit, None)
    assert region is not None and region[0, 2, 2] == 255 and not region[:, :, 0].any()
    boxed = Clip(**base, boxes=((0.0, 64.0, 32.0, 16.0, 16.0),))  # type: ignore[arg-type]
    region = latent_region(boxed, [0, 1, 2, 3, 4], fit, None)
    assert region is not None and region[0].nonzero().tolist() == [[2, 2]] and not region[1].any()
    assert latent_region(Clip(**base), [0], fit, None) is None  # type: ignore[arg-type]


def test_masks_follow_a_cut_in_time_and_must_fit(tmp_path: Path) -> None:
    video(tmp_path / "v.mp4", frames=36)
    masks = np.zeros((36, 32, 48), np.uint8)
    masks[30:, 8:16, 8:16] = 255  # seen in the held-out tail alone
    cv2.imwrite(str(tmp_path / "m.png"), masks.reshape(-1, 48))
    row = {"video_path": "v.mp4", "caption": "a hook", "masks": "m.png"}
    run(listed(tmp_path, row), tmp_path / "s")
    train, val = ShardDataset(tmp_path / "s", "train"), ShardDataset(tmp_path / "s", "val")
    assert all(not train[index].roi.any() for index in range(len(train)))  # type: ignore[union-attr]
    regions = [val[index].roi for index in range(len(val))]
    assert sum(float(region.sum()) for region in regions if region is not None) > 0
    assert all(r is not None and not r[:, 2:].any() for r in regions)
    cv2.imwrite(str(tmp_path / "m.png"), masks[:10].reshape(-1, 48))
    with pytest.raises(WanmoeError, match=r"clips\.jsonl:1: there are 10 masks, but 18 frames"):
        run(listed(tmp_path, row), tmp_path / "t")
    cv2.imwrite(str(tmp_path / "m.png"), masks[0, :20])
    with pytest.raises(WanmoeError, match=r"clips\.jsonl:1: the masks are 20 x 48, not frames of 32 x 48"):
        run(listed(tmp_path, row), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_an_unreadable_video_stops_before_anything_is_written(tmp_path: Path) -> None:
    video(tmp_path / "good.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"not a video" * 50)
    rows = [{"video_path": name, "caption": "a hook"} for name in ("good.mp4", "bad.mp4")]
    with pytest.raises(WanmoeError, match=r"clips\.jsonl:2: .*bad\.mp4: not a video") as caught:
        run(listed(tmp_path, *rows), tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.mp4", "clips.jsonl", "good.mp4"]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"size": (30, 48)}, "multiples of 16"),
        ({"frames": 16}, "4 n \\+ 1"),
        ({"task": "v2v"}, "t2v"),
        ({"val_fraction": 1.5}, "val_fraction"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any], cause: str) -> None:
    video(tmp_path / "v.mp4")
    with pytest.raises(WanmoeError, match=cause):
        run(listed(tmp_path, {"video_path": "v.mp4", "caption": "x"}), tmp_path / "s", **options)


def test_real_gestures_become_shards(tmp_path: Path, data_dir: Path) -> None:
    clips = clips_from_folder(data_dir / "gestures")
    experts = ExpertSet([Expert(name=name) for name in instrument_names(clips)])
    manifest = run(clips, tmp_path / "s", experts=experts, frames=17)
    assert set(manifest["histogram"]["train"]) == set(manifest["histogram"]["val"]) == set(experts.names)
    assert verify_shards(tmp_path / "s").ok
