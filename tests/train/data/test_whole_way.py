"""Real recordings all the way: annotations to clips, to shards, verified, drawn and read as batches."""

from pathlib import Path

import pytest
import torch

from wanmoe.moe_lora import Expert, ExpertSet, RouterConfig
from wanmoe.moe_lora.video import iter_windows, to_model
from wanmoe.moe_lora.wan.codec import load_vae
from wanmoe.moe_lora.wan.text import HashTextEncoder
from wanmoe.train import ShardDataset, verify_shards
from wanmoe.train.data.annotations import read_annotations
from wanmoe.train.data.batch import LabelGates
from wanmoe.train.data.clip_list import clips_from_folder, read_clip_list, write_clip_list
from wanmoe.train.data.cut import cut_segments
from wanmoe.train.data.loader import TrainBatches
from wanmoe.train.data.prepare import prepare
from wanmoe.train.data.sheet import show


def run(clips: list, root: Path, out: Path, experts: ExpertSet, size: tuple[int, int]) -> ShardDataset:
    """Written as a list, read again, encoded, verified and drawn."""
    write_clip_list(root / "clips.jsonl", clips)
    codec = load_vae("haar")
    prepare(
        read_clip_list(root / "clips.jsonl"),
        out,
        codec=codec,
        text_encoder=HashTextEncoder(dim=16),
        experts=experts,
        size=size,
        frames=33,
        progress=False,
    )
    report = verify_shards(out)
    assert report.ok, str(report)
    show(out, root / "sheet.png", codec, samples=3)
    assert (root / "sheet.png").stat().st_size > 20_000
    return ShardDataset(out)


def test_the_recorded_operation(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "rec").mkdir()
    (tmp_path / "rec" / "video07.mp4").symlink_to(data_dir / "surgical" / "endo.mp4")
    (tmp_path / "video07.txt").write_text(
        "camera [Tools in: hook] 0'00 0'06\n抓钳进入视野 0'06 0'10\n", encoding="utf-8"
    )
    segments = read_annotations(tmp_path / "video07.txt")
    experts = ExpertSet()
    report = cut_segments(
        segments,
        tmp_path / "rec",
        frames=(33,),
        fps=16.0,
        seconds=(2.0, 20.0),
        experts=experts,
        val_fraction=0.0,
        seed=0,
        progress=False,
    )
    data = run(list(report.clips), tmp_path, tmp_path / "s", experts, (96, 176))
    assert len(data) == 3 and data.buckets == {(9, 12, 22): [0, 1, 2]}
    labels = [dict(data.instruments(index)) for index in range(3)]
    assert labels == [{"Hook/Electrocautery": 1.0}] * 2 + [{"Other": 1.0}]
    for index, clip in enumerate(report.clips):
        sample = data[index]
        first, last = sample.meta["source_frames"]
        assert (first, last) == (clip.start_frame, clip.start_frame + (clip.num_frames or 0) - 1)
        # Half of the corners' cells lie in the dark border round the picture, and none in the middle.
        assert sample.picture is not None and 0.05 < 1 - float(sample.picture.mean()) < 0.3
        assert sample.picture[4:8, 6:16].min() == 1 and sample.picture[0, 0] == 0
        assert sample.flow is not None and sample.flow.shape == (8, 2, 12, 22)
        assert sample.visible is not None and sample.visible.mean() > 0.4
    # The first window by hand: 33 frames at 16 of 25 a second, in the half precision of the shards.
    indices = [int(place * 25 / 16 + 0.5) for place in range(33)]
    (pictures,) = iter_windows(data_dir / "surgical" / "endo.mp4", [indices], (96, 176))
    truth = load_vae("haar").encode(to_model(pictures)[None])[0]
    assert torch.equal(data[0].latent, truth.half())


def test_the_signed_words_with_experts_of_their_own(tmp_path: Path, data_dir: Path) -> None:
    clips = clips_from_folder(data_dir / "gestures")
    experts = ExpertSet([Expert(name=clip.id) for clip in clips])
    report = cut_segments(
        clips,
        data_dir / "gestures",
        frames=(33, 17),
        fps=16.0,
        seconds=(1.0, 20.0),
        experts=experts,
        val_fraction=0.0,
        seed=0,
        progress=False,
    )
    data = run(list(report.clips), tmp_path, tmp_path / "s", experts, (64, 96))
    assert set(data.buckets) == {(5, 8, 12), (9, 8, 12)}
    assert {name for index in range(len(data)) for name, _ in data.instruments(index)} == set(experts.names)
    assert all(data[index].picture is None or bool(data[index].picture.all()) for index in range(len(data)))
    gates = LabelGates(experts, RouterConfig(), needed=True)
    options = {
        "batch": 2,
        "accumulation": 1,
        "rank": 0,
        "world": 1,
        "seed": 0,
        "balanced": True,
        "workers": 0,
    }
    seen = torch.zeros(len(experts))
    for batch in TrainBatches(data, gates, **options)(0, 60):
        seen += batch.rule.sum(0)
    assert seen.sum() == pytest.approx(120) and seen.min() >= 5, "every word about as often"
