"""Drawn scenes as shards, and the two judges trained on them for some seconds."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from wanmoe.moe_lora import ExpertSet
from wanmoe.moe_lora.video import to_model
from wanmoe.moe_lora.wan.codec import HaarCodec
from wanmoe.train.data.region import pool
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.judges import Recipe, train_classifier, train_detector
from wanmoe.train.synth_scene import draw_scene
from wanmoe.train.synth_tools import TOOLS

CODEC = HaarCodec()
FACTS = {"name": CODEC.name, "fingerprint": CODEC.fingerprint, "stand_in": True}
TEXT = {"name": "none", "fingerprint": "0" * 64, "stand_in": True}


@pytest.fixture(scope="session")
def scenes() -> list[tuple]:
    """(split, latent, roi, name, tips) of 64 training and 24 held-out scenes of 96 x 96 x 17."""
    out = []
    for split, count in (("train", 64), ("val", 24)):
        for number in range(count):
            rng = np.random.default_rng([7, split == "val", number])
            tool = TOOLS[number % 4]
            scene = draw_scene([tool], rng, frames=17, height=96, width=96)
            latent = CODEC.encode(to_model(torch.from_numpy(scene.frames))[None])[0]
            tips = [
                {"frame": k, "x": x, "y": y, "instrument": "", "track": "", "kind": "given"}
                for k, x, y in scene.tips
            ]
            out.append((split, latent, pool(torch.from_numpy(scene.masks)), tool.name, tips))
    return out


def write(root: Path, scenes: list[tuple]) -> Path:
    """Shards of such scenes; a name "" has no label."""
    with ShardWriter(root, FACTS, TEXT, null_context=torch.ones(1, 4)) as writer:
        for number, (split, latent, roi, name, tips) in enumerate(scenes):
            labels = [{"name": name, "weight": 1.0}] if name else []
            meta = {"caption": "x", "instruments": labels, "tips": tips, "source": f"s{number}"}
            writer.add(f"{split}_{number:03d}_abcdef01", split, latent, torch.ones(1, 4), meta, roi=roi)
    return root


@pytest.fixture(scope="session")
def make():
    """`write`, for tests that need shards of their own."""
    return write


@pytest.fixture(scope="session")
def drawn(tmp_path_factory, scenes) -> Path:
    return write(tmp_path_factory.mktemp("drawn") / "shards", scenes)


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory, drawn) -> Path:
    path = tmp_path_factory.mktemp("judge") / "new" / "classifier.safetensors"
    train_classifier(drawn, path, experts=ExpertSet(), recipe=Recipe(steps=80, batch=8))
    return path


@pytest.fixture(scope="session")
def detector_file(tmp_path_factory, drawn) -> Path:
    path = tmp_path_factory.mktemp("judge") / "detector.safetensors"
    train_detector(drawn, path, recipe=Recipe(steps=120, batch=8))
    return path


@pytest.fixture
def copy(tmp_path):
    """A copy of a file, to be spoiled."""

    def of(path: Path) -> Path:
        return Path(shutil.copy(path, tmp_path / path.name))

    return of
