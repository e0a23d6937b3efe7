"""Clips to shards, with small stand-ins: latents, labels, regions and splits are what the clips say."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import SURGICAL, Expert, ExpertSet
from wanmoe.moe_lora.video import read_video, to_model, video_info, write_video
from wanmoe.moe_lora.wan.codec import load_vae
from wanmoe.moe_lora.wan.text import HashTextEncoder
from wanmoe.train.data.clip_list import clips_from_folder, read_clip_list
from wanmoe.train.data.clips import Clip, instrument_names
from wanmoe.train.data.prepare import Ranks, prepare
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.data.spool import Spool, text_name
from wanmoe.train.data.verify import verify_shards
from wanmoe.train.synth import synth_clips

EXPERTS = ExpertSet(SURGICAL)


class MeanCodec:
    """Means over the cells of the latent grid, repeated to 16 channels; keeps the shapes it was given, and
    fails, if asked to, after so many videos."""

    name, fingerprint, stand_in = "mean", "mean-1", True

    def __init__(self, lasts: int = 1000, error: type[Exception] = WanmoeError) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.lasts, self.error = lasts, error

    def encode(self, video: Tensor) -> Tensor:
        if len(self.shapes) == self.lasts:
            raise self.error("the codec broke")
        self.shapes.append(tuple(video.shape))
        cells = video.unflatten(3, (-1, 8)).unflatten(5, (-1, 8)).mean((4, 6))
        rest = cells[:, :, 1:].unflatten(2, (-1, 4)).mean(3)
        return torch.cat([cells[:, :, :1], rest], dim=2).repeat(1, 6, 1, 1, 1)[:, :16]

    def decode(self, latent: Tensor) -> Tensor:
        raise NotImplementedError


def run(clips: list[Clip], out: Path, **options: Any) -> dict[str, Any]:
    options = {"experts": EXPERTS, "size": (32, 48), "frames": 9, "progress": False, **options}
    options = {"codec": MeanCodec(), "text_encoder": HashTextEncoder(dim=16), **options}
    return prepare(clips, out, **options)


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
        assert clip.split == "val" and sample.meta["tips"] == [tip._asdict() for tip in clip.tips]
        assert sample.meta["fps"] == 16 and sample.meta["n_frames"] == 9 and sample.meta["size"] == [32, 48]
    assert verify_shards(tmp_path / "s").ok


def test_a_rebuild_is_identical_wherever_the_clips_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        clips = read_clip_list(synth_clips(tmp_path / name / "clips", clips=4, val=2, frames=9))
        run(clips, tmp_path / name / "s")
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


def test_i2v_stores_the_condition_on_the_first_frame(tmp_path: Path) -> None:
    video(tmp_path / "v.mp4", frames=9)
    run(listed(tmp_path, {"video_path": "v.mp4", "caption": "x"}), tmp_path / "s", task="i2v")
    sample = ShardDataset(tmp_path / "s")[0]
    assert sample.image_latent is not None and sample.image_latent.shape == (20, 3, 4, 6)
    assert sample.image_latent[:4, 0].unique().tolist() == [1.0]
    assert not sample.image_latent[:4, 1:].any()
    assert torch.allclose(sample.image_latent[4:, 0], sample.latent[:, 0], atol=1e-3)
    assert not sample.image_latent[4:, 1:].any(), "grey frames are 0 in [-1, 1]"


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def six(tmp_path: Path) -> list[Clip]:
    """Six windows of two videos, with three captions."""
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        video(tmp_path / name, frames=28, seed=seed)
    rows = [
        {"video_path": name, "caption": f"the hook {name}", "split": "train"} for name in ("a.mp4", "b.mp4")
    ]
    return listed(tmp_path, *rows)


def test_a_run_that_failed_goes_on_where_it_was(
    tmp_path: Path, six: list[Clip], capsys: pytest.CaptureFixture[str]
) -> None:
    run(six, tmp_path / "whole")
    for lasts in (2, 1, 0):
        with pytest.raises(WanmoeError, match="the codec broke"):
            run(six, tmp_path / "s", codec=MeanCodec(lasts))
        assert not (tmp_path / "s").exists()
    before = {path.name: path.stat().st_mtime_ns for path in Spool(tmp_path / "s").folder.glob("*_*")}
    assert len(before) == 3
    codec = MeanCodec()
    run(six, tmp_path / "s", codec=codec, progress=True)
    assert len(codec.shapes) == 3 and "3 of 6 samples are encoded already" in capsys.readouterr().err
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert not Spool(tmp_path / "s").folder.exists()


def test_a_sample_is_encoded_alone(tmp_path: Path, six: list[Clip]) -> None:
    codec = MeanCodec()
    run(six, tmp_path / "s", codec=codec)
    assert codec.shapes == [(1, 3, 9, 32, 48)] * 6


def test_a_damaged_sample_and_a_damaged_text_are_named_and_encoded_again(
    tmp_path: Path, six: list[Clip], capsys: pytest.CaptureFixture[str]
) -> None:
    run(six, tmp_path / "whole")
    with pytest.raises(WanmoeError, match="the codec broke"):
        run(six, tmp_path / "s", codec=MeanCodec(4))
    spool = Spool(tmp_path / "s")
    sample = sorted(spool.folder.glob("*-w*.safetensors"))[1]
    text = spool.path(text_name(six[0].caption))
    for path in (sample, text):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    codec = MeanCodec()
    run(six, tmp_path / "s", codec=codec, progress=True)
    told = capsys.readouterr().err
    assert f"damaged, encoded again: {sample}" in told and f"damaged, encoded again: {text}" in told
    assert len(codec.shapes) == 3 and "3 of 6 samples are encoded already" in told
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fps": 12.0}, "the clips differ"),
        ({"task": "i2v"}, "settings.task is i2v, it was t2v"),
        ({"text_encoder": HashTextEncoder(dim=8)}, "text_encoder.fingerprint is"),
    ],
)
def test_other_settings_start_afresh_and_say_why(
    tmp_path: Path, six: list[Clip], capsys: pytest.CaptureFixture[str], change: dict[str, Any], why: str
) -> None:
    with pytest.raises(WanmoeError, match="the codec broke"):
        run(six, tmp_path / "s", codec=MeanCodec(4))
    run(six, tmp_path / "s", progress=True, **change)
    told = capsys.readouterr().err
    assert "s.work: starting afresh" in told and why in told and "encoded already" not in told
    run(six, tmp_path / "whole", **change)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_label_or_a_mask_that_changed_is_another_sample(tmp_path: Path) -> None:
    video(tmp_path / "v.mp4", frames=28)
    masks = np.zeros((28, 32, 48), np.uint8)
    row = {"video_path": "v.mp4", "caption": "a hook", "masks": "m.png", "split": "train"}
    for change, edited in (
        ({}, 0),
        ({}, 255),
        ({"instruments": ["Scissors"]}, 255),
        ({"tips": [[3, 8, 8]]}, 255),
    ):
        masks[0, 0, 0] = edited
        cv2.imwrite(str(tmp_path / "m.png"), masks.reshape(-1, 48))
        codec = MeanCodec(2)
        with pytest.raises(WanmoeError, match="the codec broke"):
            run(listed(tmp_path, {**row, **change}), tmp_path / "s", codec=codec)
        assert len(codec.shapes) == 2, (change, edited)


def test_a_window_beyond_the_end_of_its_video_is_dropped_on_every_way(
    tmp_path: Path, six: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some containers say more frames than they hold."""
    real = video_info
    monkeypatch.setattr("wanmoe.train.data.plan.video_info", lambda path: replace(real(path), frames=60))
    manifest = run(six, tmp_path / "whole", frames=(9, 5), window_stride=7)
    reason = "the video ends before the window does"
    assert manifest["dropped"] == {reason: 10} and manifest["n_samples"] == {"train": 6}
    with pytest.raises(WanmoeError, match="the codec broke"):
        run(six, tmp_path / "s", frames=(9, 5), window_stride=7, codec=MeanCodec(4))
    run(six, tmp_path / "s", frames=(9, 5), window_stride=7)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_short_window_survives_a_longer_one_that_the_video_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video(tmp_path / "v.mp4", frames=20)
    real = video_info
    monkeypatch.setattr("wanmoe.train.data.plan.video_info", lambda path: replace(real(path), frames=60))
    windows = ((0, 33), (3, 9), (4, 21), (5, 29), (8, 9), (12, 9))  # the last ends with frame 20
    row = {"video_path": "v.mp4", "caption": "the hook", "split": "train"}
    clips = listed(tmp_path, *(row | {"start_frame": start, "frames": frames} for start, frames in windows))
    assert run(clips, tmp_path / "s")["dropped"] == {"the video ends before the window does": 4}
    data = ShardDataset(tmp_path / "s")
    assert [data[index].meta["source_frames"] for index in range(len(data))] == [[3, 11], [8, 16]]


def test_a_place_that_is_not_ours_is_refused_before_anything_is_encoded(
    tmp_path: Path, six: list[Clip]
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    codec = MeanCodec()
    with pytest.raises(WanmoeError, match=r"holds other files \(thesis\.txt\)"):
        run(six, tmp_path / "s", codec=codec)
    assert not codec.shapes and not Spool(tmp_path / "s").folder.exists()


def test_a_card_that_is_too_small_is_told_with_the_clip(tmp_path: Path, six: list[Clip]) -> None:
    with pytest.raises(WanmoeError, match=r"clips\.jsonl:1: the GPU's memory is too small for 9 frames"):
        run(six, tmp_path / "s", codec=MeanCodec(1, torch.OutOfMemoryError))


def test_values_that_no_shard_can_hold_stop_at_once(tmp_path: Path, six: list[Clip]) -> None:
    class Broken(MeanCodec):
        def encode(self, video: Tensor) -> Tensor:
            return super().encode(video) * 1e6

    codec = Broken()
    with pytest.raises(WanmoeError, match=r"clips\.jsonl:1: latent holds NaN, or values that torch.float16"):
        run(six, tmp_path / "s", codec=codec)
    assert len(codec.shapes) == 1


@pytest.mark.parametrize("length", [0, 1, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_ranks_share_every_item_once_in_runs(count: int, length: int) -> None:
    shares = [list(Ranks(rank, count).share(range(length))) for rank in range(count)]
    assert [item for share in shares for item in share] == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_progress_says_samples_a_second_and_the_time_left(
    tmp_path: Path, six: list[Clip], capsys: pytest.CaptureFixture[str]
) -> None:
    run(six, tmp_path / "s", progress=True)
    assert re.search(
        r"encode: 100%\|.*\| 6/6 \[\d\d:\d\d<00:00, *[\d.]+ samples/s\]", capsys.readouterr().err
    )
