"""A damaged folder of shards: what is intact is saved, what is lost is named, and nothing is deleted."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data import repair as module
from wanmoe.train.data.repair import RepairReport, repair
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.data.verify import verify_shards

CODEC = {"name": "test", "fingerprint": "c0", "stand_in": True}
TEXT = {"name": "test", "fingerprint": "t0", "stand_in": True}
TRAIN, VAL, TEXTS = "train-3x2x5-000000.tar", "val-3x2x5-000000.tar", "text-000000.tar"
BLOCK = 512


def write(root: Path, count: int = 5, val: int = 2, **options: Any) -> Path:
    """Samples v_0..v_6 with region and flow, each with a caption of its own; `options` go to the writer."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    settings = {"task": "t2v", "fps": 16}
    with ShardWriter(root, CODEC, TEXT, settings=settings, null_context=noise(1, 6), **options) as writer:
        for number in range(count + val):
            writer.add(
                f"v_{number}",
                "train" if number < count else "val",
                noise(16, 3, 2, 5),
                noise(2 + number, 6),
                {
                    "caption": f"剪刀 {number}",
                    "instruments": [{"name": "Other", "weight": 1.0}],
                    "source": "s",
                },
                roi=torch.full((3, 2, 5), 255, dtype=torch.uint8),
                flow=noise(2, 2, 2, 5),
                visible=torch.full((2, 2, 5), 255, dtype=torch.uint8),
            )
    return root


def index(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "index.jsonl").read_text().splitlines()]


def manifest(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "manifest.json").read_text()))


def place(root: Path, key: str, part: str) -> int:
    return int(next(row for row in index(root) if row["key"] == key)["parts"][part]["offset"])


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def samples(root: Path) -> dict[str, Any]:
    """Every sample of a folder of shards, by key."""
    found = {}
    for split in manifest(root)["n_samples"]:
        data = ShardDataset(root, split)
        found |= {data.keys[number]: data[number] for number in range(len(data))}
    return found


def same(sample: Any, other: Any) -> bool:
    tensors = ("latent", "context", "roi", "flow", "visible")
    equal = all(torch.equal(getattr(sample, name), getattr(other, name)) for name in tensors)
    return equal and sample.meta == other.meta and sample.instruments == other.instruments


def check(root: Path, lost: set[str], before: dict[str, Any]) -> RepairReport:
    """Repair, and hold what is there afterwards against what was there before the damage."""
    damaged = contents(root)
    plan = repair(root)
    assert contents(root) == damaged and plan.quarantine is None and plan.needed
    assert sorted(path.name for path in root.parent.iterdir()) == [root.name]
    report = repair(root, apply=True)
    assert report.quarantine is not None
    assert (report.kept, report.lost, report.rewritten) == (plan.kept, plan.lost, plan.rewritten)
    verified = verify_shards(root)
    assert verified.ok, verified.problems
    after = samples(root)
    assert set(after) == set(before) - lost
    assert all(same(after[key], before[key]) for key in after)
    kept_files = {*contents(root).items(), *contents(report.quarantine).items()}
    assert set(damaged.items()) <= kept_files  # nothing was deleted
    assert not repair(root).needed
    record = manifest(root)["repaired"][-1]
    assert record["lost"] == report.lost and record["quarantine"] == report.quarantine.name
    assert record["n_lost"] == len(report.lost) + sum(report.unnamed.values())
    return report


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "sets").mkdir()
    return write(tmp_path / "sets" / "s")


def test_sound_shards_need_no_repair(root: Path) -> None:
    before = contents(root)
    report = repair(root, apply=True)
    assert not report.needed and str(report) == f"{root}: nothing to repair"
    assert contents(root) == before and list(root.parent.iterdir()) == [root]


def test_a_flipped_byte_of_a_payload_costs_its_sample_alone(root: Path) -> None:
    before = samples(root)
    sound = (root / VAL).stat().st_ino
    flip(root / TRAIN, place(root, "v_2", "flow.safetensors") + 100)
    report = check(root, {"v_2"}, before)
    assert report.lost["v_2"] == "flow.safetensors: altered: the checksum differs from the index"
    assert report.kept == {"train": 4, "val": 2} and report.not_verifiable == []
    assert (root / VAL).stat().st_ino == sound  # a sound shard is not written again
    assert report.quarantine and VAL not in contents(report.quarantine)
    assert [row["key"] for row in index(root) if row["split"] == "train"] == ["v_0", "v_1", "v_3", "v_4"]
    assert "lost v_2: flow.safetensors: altered" in str(report) and "quarantine-1" in str(report)
    assert manifest(root)["task"] == "t2v" and manifest(root)["null_text"]


def test_a_flipped_header_costs_nothing_where_the_index_is_sound(root: Path) -> None:
    before, whole = samples(root), (root / TRAIN).read_bytes()
    for key in ("v_0", "v_3"):
        flip(root / TRAIN, place(root, key, "json") - BLOCK + 3)
    report = check(root, set(), before)
    assert report.rewritten == [TRAIN] and report.lost == {}
    assert (root / TRAIN).read_bytes() == whole  # the same layout as the writer's


@pytest.mark.parametrize("at", ["header", "payload", "border", "tail"])
def test_a_cut_shard_keeps_the_samples_before_the_cut(root: Path, at: str) -> None:
    before = samples(root)
    offset = place(root, "v_3", "roi.safetensors")
    cut = {
        "header": offset - 200,
        "payload": offset + 20,
        "border": place(root, "v_3", "latent.safetensors") - BLOCK,
    }
    data = (root / TRAIN).read_bytes()
    (root / TRAIN).write_bytes(data[: cut.get(at, len(data) - 1)])
    report = check(root, set() if at == "tail" else {"v_3", "v_4"}, before)
    assert all("lie beyond its end" in reason or "cut short" in reason for reason in report.lost.values())


def test_a_lost_a_garbled_and_a_stray_shard(root: Path) -> None:
    before = samples(root)
    (root / VAL).unlink()
    (root / "train-3x2x5-000007.tar").write_bytes((root / TRAIN).read_bytes())
    (root / TRAIN).write_bytes(np.random.default_rng(0).bytes(20_000))
    with pytest.raises(WanmoeError, match="no sample can be saved"):
        repair(root, apply=True)
    (root / TRAIN).write_bytes((root / "train-3x2x5-000007.tar").read_bytes())
    report = check(root, {"v_5", "v_6"}, before)
    assert report.dropped == ["train-3x2x5-000007.tar"]
    assert set(report.lost) == {"v_5", "v_6"} and manifest(root)["n_samples"] == {"train": 5}


def test_a_lost_text_takes_its_samples_with_it(root: Path) -> None:
    before = samples(root)
    text = next(row for row in index(root) if row["key"] == "v_1")["text"]
    flip(root / TEXTS, place(root, text, "text.safetensors") + 20)
    report = check(root, {"v_1"}, before)
    assert report.lost["v_1"] == f"its text {text} is lost" and text in report.lost


def test_the_lost_text_of_no_caption_is_said(root: Path) -> None:
    before = samples(root)
    flip(root / TEXTS, place(root, manifest(root)["null_text"], "text.safetensors") + 20)
    report = check(root, set(), before)
    assert "null_text" not in manifest(root) and any("no caption" in note for note in report.notes)


@pytest.mark.parametrize("lost", ["index", "manifest", "both", "index altered", "manifest altered"])
def test_index_and_manifest_are_built_anew(root: Path, lost: str) -> None:
    before, old = samples(root), manifest(root)
    if lost == "index altered":
        flip(root / "index.jsonl", 200)
    elif lost == "manifest altered":
        flip(root / "manifest.json", 200)
    if lost in ("index", "both"):
        (root / "index.jsonl").unlink()
    if lost in ("manifest", "both"):
        (root / "manifest.json").unlink()
    report = check(root, set(), before)
    new = manifest(root)
    # Without the index and the SHA-256 of the shards nothing vouches for the samples.
    assert report.not_verifiable == (sorted(before) if lost == "both" else [])
    assert new["repaired"][0]["not_verifiable"] == report.not_verifiable
    named = (
        "codec",
        "text_encoder",
        "text_dim",
        "image_latents",
        "null_text",
        "n_samples",
        "shards",
        "histogram",
    )
    assert {name: new[name] for name in named} == {name: old[name] for name in named}
    assert ("task" in new) == (lost in ("index", "index altered"))
    if lost == "both":
        assert "kept, but not verifiable against an index: v_0" in str(report)


@pytest.mark.parametrize("lost", ["index", "both"])
def test_a_flipped_header_without_an_index_costs_its_sample_alone(root: Path, lost: str) -> None:
    before = samples(root)
    flip(root / TRAIN, place(root, "v_1", "roi.safetensors") - BLOCK + 3)
    (root / "index.jsonl").unlink()
    if lost == "both":
        (root / "manifest.json").unlink()
    report = check(root, {"v_1"}, before)  # not v_1 without its region
    assert "v_1" in report.lost and report.unnamed == {}


def test_a_cut_shard_without_an_index_tells_how_many_are_lost(root: Path) -> None:
    before = samples(root)
    cut = place(root, "v_3", "latent.safetensors") - BLOCK
    (root / TRAIN).write_bytes((root / TRAIN).read_bytes()[:cut])
    (root / "index.jsonl").unlink()
    report = check(root, {"v_3", "v_4"}, before)
    assert report.unnamed == {TRAIN: 2} and report.not_verifiable == ["v_0", "v_1", "v_2"]
    assert manifest(root)["repaired"][0]["n_lost"] == 2


def test_an_altered_index_still_vouches_by_its_sound_rows(root: Path) -> None:
    before = samples(root)
    flip(root / TRAIN, place(root, "v_2", "latent.safetensors") + 200)  # no header shows it
    flip(root / TRAIN, place(root, "v_4", "json") - BLOCK + 3)
    lines = (root / "index.jsonl").read_bytes().splitlines(keepends=True)
    broken = next(number for number, line in enumerate(lines) if b'"v_0"' in line)
    lines[broken] = lines[broken][:40] + b"\n"
    (root / "index.jsonl").write_bytes(b"".join(lines))
    report = check(root, {"v_2"}, before)
    assert report.not_verifiable == ["v_0"] and "checksum" in report.lost["v_2"]


def test_what_is_wrong_in_itself_is_not_kept_although_no_checksum_says_so(root: Path) -> None:
    before = samples(root)
    start = place(root, "v_2", "latent.safetensors")
    with (root / TRAIN).open("r+b") as file:
        file.seek(start + int.from_bytes((root / TRAIN).read_bytes()[start : start + 8], "little") + 8)
        file.write(b"\xff\xff")  # a NaN
    (root / "index.jsonl").unlink()
    report = check(root, {"v_2"}, before)
    assert report.lost["v_2"] == "latent.safetensors: latent holds NaN or infinity"


def test_damage_at_random_places_never_brings_back_a_wrong_sample(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for trial in range(12):
        (tmp_path / str(trial)).mkdir()
        root = write(tmp_path / str(trial) / "s", count=4, val=1, max_bytes=9_000)
        before = samples(root)
        tars = sorted(root.glob("t*.tar"))
        for _ in range(int(generator.integers(1, 5))):
            path = tars[int(generator.integers(len(tars)))]
            flip(path, int(generator.integers(path.stat().st_size)))
        if trial % 3 == 1:
            path = tars[int(generator.integers(len(tars)))]
            path.write_bytes(path.read_bytes()[: int(generator.integers(path.stat().st_size))])
        if trial % 3 == 2:
            flip(root / "index.jsonl", int(generator.integers((root / "index.jsonl").stat().st_size)))
        report = repair(root, apply=True)
        after = samples(root)
        assert verify_shards(root).ok
        assert set(after) | set(report.lost) >= set(before)
        for key in set(after) - set(report.not_verifiable):
            assert same(after[key], before[key]), (trial, key)


def test_repaired_twice_keeps_both_records_and_both_quarantines(root: Path) -> None:
    before = samples(root)
    (root / "notes.txt").write_text("mine")
    flip(root / TRAIN, place(root, "v_2", "json") + 3)
    repair(root, apply=True)
    flip(root / TRAIN, place(root, "v_0", "json") + 3)
    repair(root, apply=True)
    assert [
        record["lost"].keys() >= {key}
        for record, key in zip(manifest(root)["repaired"], ("v_2", "v_0"), strict=True)
    ]
    assert sorted(path.name for path in root.parent.iterdir()) == ["s", "s.quarantine-1", "s.quarantine-2"]
    assert set(samples(root)) == set(before) - {"v_0", "v_2"}
    assert (root / "notes.txt").read_text() == "mine"  # what is not ours stays where it is


def test_a_disk_that_is_full_leaves_everything_as_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(root / TRAIN, place(root, "v_2", "json") + 3)
    before = contents(root)

    def full(self: object, name: str, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.TarFile, "append", full)
    with pytest.raises(WanmoeError, match="it is as it was: No space left on device"):
        repair(root, apply=True)
    assert contents(root) == before and list(root.parent.iterdir()) == [root]


def test_a_file_system_without_hard_links_gets_copies(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = samples(root)
    flip(root / TRAIN, place(root, "v_2", "json") + 3)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    check(root, {"v_2"}, before)


def test_samples_of_two_codecs_without_a_manifest_are_told_apart(root: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "other", {**CODEC, "fingerprint": "c1"}, TEXT) as writer:
        facts = {"caption": "x", "instruments": []}
        writer.add("w", "train", torch.zeros(16, 1, 2, 2), torch.zeros(2, 6), facts)
    (root / "train-1x2x2-000000.tar").write_bytes(
        (tmp_path / "other" / "train-1x2x2-000000.tar").read_bytes()
    )
    (root / "manifest.json").unlink()
    with pytest.raises(WanmoeError, match="2 codecs or text encoders; move the shards of all but one away"):
        repair(root)


def test_what_cannot_be_repaired_is_one_line(root: Path, tmp_path: Path) -> None:
    with pytest.raises(WanmoeError, match="copy it to this machine first"):
        repair("s3://bucket/shards")
    with pytest.raises(WanmoeError, match="no such folder"):
        repair(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WanmoeError, match="no whole sample is in any of its tars"):
        repair(tmp_path / "empty")
