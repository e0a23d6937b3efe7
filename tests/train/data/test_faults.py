"""A thousand damaged folders of shards: none of them gives a batch of anything but what was written."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanmoe.moe_lora import ExpertSet, RouterConfig, WanmoeError
from wanmoe.train.data.batch import LabelGates
from wanmoe.train.data.loader import TrainBatches
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import ShardDataset, ShardIndex, manifest_bytes
from wanmoe.train.data.stream import ShardStream

TRIALS = 1000
COUNT = 9
TRUTH = dict[str, tuple[Tensor, Tensor]]


def write(root: Path, codec: str) -> TRUTH:
    """Nine clips in four shards; returns what they are."""
    truth = {}
    head = {"name": "t", "fingerprint": codec, "stand_in": True}
    generator = torch.Generator().manual_seed(int(codec[1:]))
    with ShardWriter(
        root, head, head, null_context=torch.full((1, 4), float(codec[1:])), max_bytes=3_000
    ) as writer:
        for number in range(COUNT):
            latent = torch.randn(16, 1, 2, 2, generator=generator).half()
            context = torch.randn(2, 4, generator=generator).half()
            key = f"clip_{number}"
            truth[key] = (latent, context)
            labels = [{"name": "Suction", "weight": 1.0}]
            writer.add(key, "train", latent, context, {"caption": "x", "instruments": labels})
    return truth


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, TRUTH, Path]:
    """A folder, its truth, and a folder of the same names and sizes made by another codec."""
    root = tmp_path_factory.mktemp("faults")
    return root / "s", write(root / "s", "c0"), write(root / "other", "c1") and root / "other"


def bit_flip(root: Path, other: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(root.iterdir()))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data.rstrip(b"\0")))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncation(root: Path, other: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(root.iterdir()))
    data = path.read_bytes()
    # Half of them at a border of the tar's blocks, where a tar reader sees nothing wrong.
    place = rng.randrange(len(data))
    path.write_bytes(data[: place // 512 * 512 if rng.random() < 0.5 else place])


def missing_shard(root: Path, other: Path, rng: random.Random) -> None:
    rng.choice(sorted(root.glob("*.tar"))).unlink()


def swapped_file(root: Path, other: Path, rng: random.Random) -> None:
    one, two = rng.sample(sorted(root.glob("*.tar")), 2)
    if rng.random() < 0.5:
        shutil.copy(other / one.name, one)
    else:
        data = one.read_bytes()
        shutil.copy(two, one)
        two.write_bytes(data)


def wrong_fingerprint(root: Path, other: Path, rng: random.Random) -> None:
    """The manifest of another codec's folder over these samples, or a sealed one that is wrong."""
    manifest = json.loads((root / "manifest.json").read_text())
    if rng.random() < 0.5:
        manifest[rng.choice(["codec", "text_encoder"])]["fingerprint"] = f"{rng.random()}"
        (root / "manifest.json").write_bytes(manifest_bytes(manifest))
    else:
        for name in rng.choice([("manifest.json",), ("index.jsonl",), ("manifest.json", "index.jsonl")]):
            shutil.copy(other / name, root / name)


FAULTS = (bit_flip, truncation, missing_shard, swapped_file, wrong_fingerprint)


def unchecked(root: Path, truth: TRUTH) -> bool:
    """Whether a reader that trusts index and tar would have used wrong data: what the checks are for."""
    for line in (root / "index.jsonl").read_bytes().splitlines():
        try:
            row = json.loads(line)
            place = row["parts"]["latent.safetensors"]
            data = (root / row["shard"]).read_bytes()[place["offset"] : place["offset"] + place["size"]]
        except (ValueError, KeyError, OSError):
            continue
        latent = truth.get(row["key"], (torch.zeros(0), None))[0]
        if len(data) == place["size"] and data[-latent.nbytes :] != latent.numpy().tobytes():
            return True
    return False


@pytest.mark.parametrize("reader", [ShardDataset, ShardStream])
def test_none_of_a_thousand_faults_trains_on_wrong_data(
    tmp_path: Path, sound: tuple[Path, TRUTH, Path], reader: type[ShardIndex]
) -> None:
    root, truth, other = sound
    gates = LabelGates(ExpertSet(), RouterConfig(), needed=True)
    outcomes: Counter[tuple[str, str]] = Counter()
    blind = 0
    for trial in range(TRIALS // 2):
        rng = random.Random(f"{reader.__name__}{trial}")
        damage = FAULTS[trial % len(FAULTS)]
        folder = tmp_path / "t"
        shutil.copytree(root, folder)
        damage(folder, other, rng)
        blind += unchecked(folder, truth)
        options = {"seed": trial} if reader is ShardStream else {}
        outcome = "unharmed"
        try:
            batches = TrainBatches(
                reader(folder, **options),
                gates,
                batch=1,
                accumulation=1,
                rank=0,
                world=1,
                seed=trial,
                balanced=False,
                workers=0,
                max_bad=COUNT,
            )
            made = list(batches(0, COUNT))
            assert len(made) == COUNT, "a batch for every step"
            for batch in made:
                latent, context = truth[batch.keys[0]]
                assert torch.equal(batch.latent[0], latent) and torch.equal(batch.context[0], context)
            assert batches.null_context is not None and not batches.null_context.any()
            if any(batch.faults for batch in made):
                outcome = "replaced"
        except WanmoeError as error:
            assert "\n" not in str(error)
            outcome = "refused"
        outcomes[damage.__name__, outcome] += 1
        shutil.rmtree(folder)
    print(f"{reader.__name__}: {dict(outcomes)}; a reader without checks: wrong data in {blind}")
    assert sum(outcomes.values()) == TRIALS // 2 and blind > 20
    # Headers and padding of the tars are bytes that hold no sample: damage there may do no harm.
    harmless = {"bit_flip", "truncation"} if reader is ShardStream else {"bit_flip"}
    assert {name for name, outcome in outcomes if outcome == "unharmed"} <= harmless
    assert outcomes["bit_flip", "replaced"] > 5 and outcomes["bit_flip", "refused"] > 5
