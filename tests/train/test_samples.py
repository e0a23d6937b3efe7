"""Videos made while training goes on: by all ranks and both models, of held-out captions."""

import pytest
import torch

from wanmoe.launch.config import parse_config
from wanmoe.moe_lora import WanmoeError, load_vae
from wanmoe.moe_lora.video import read_metadata, read_video
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import load_dit, save_dit
from wanmoe.train.samples import file_name


@pytest.fixture
def drawn(config, base, make_shards, tmp_path):
    """Both models, and shards of the codec that decodes."""
    torch.manual_seed(7)
    dit = WanDiT(load_dit(base).config)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    save_dit(dit, tmp_path / "high.safetensors")
    codec = {"name": "haar", "fingerprint": load_vae("haar").fingerprint, "stand_in": True}
    config["model"] |= {"dit_high_noise": str(tmp_path / "high.safetensors")}
    config["data"] |= {"shards": str(make_shards(tmp_path / "clips", codec=codec))}
    config["objective"] |= {"vae": "haar", "high_share": 0.5}
    config["train"] |= {"stage": "b", "steps": 4, "global_batch": 2, "sample_every": 2, "sample_steps": 5}
    return config


def frames(run, step):
    paths = sorted((run / "samples" / f"step_{step:06d}").glob("*.mp4"))
    return {path.stem: read_video(path) for path in paths}


def test_all_ranks_and_both_models_draw_the_held_out_captions(ranks, drawn, tmp_path):
    text = ranks.run(drawn, 2)
    run = tmp_path / "run"
    early, late = frames(run, 2), frames(run, 4)
    assert list(early) == list(late) == ["hook-electrocautery", "other", "scissors", "suction"]
    assert all(video.shape == (5, 32, 32, 3) for video in early.values())
    path = run / "samples" / "step_000004" / "scissors.mp4"
    assert read_metadata(path)["instrument"] == "Scissors" and str(path) in text
    # From the same noise at each step: what differs is what was learned in between, and the instrument.
    assert any(not torch.equal(early[name], late[name]) for name in early)
    assert not torch.equal(late["scissors"], late["suction"])
    drawn["train"]["run"] = str(tmp_path / "alone")
    drawn["deepspeed"] = {"zero": 0}
    ranks.run(drawn, 1)
    for name, video in frames(tmp_path / "alone", 4).items():
        assert (video.int() - late[name].int()).abs().max() <= 2, name


def test_drawing_changes_nothing_of_what_is_trained(ranks, drawn, tmp_path):
    from safetensors.torch import load_file

    ranks.run(drawn, 2)
    drawn["train"] |= {"run": str(tmp_path / "plain"), "sample_every": 0}
    ranks.run(drawn, 2)
    for side in ("high", "low"):
        ours, theirs = (load_file(tmp_path / run / f"adapter-{side}.safetensors") for run in ("run", "plain"))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_what_it_needs(drawn):
    del drawn["objective"]["vae"]
    with pytest.raises(WanmoeError, match="sample_every needs a codec that decodes: set objective.vae"):
        parse_config(drawn, "test")
    drawn["objective"]["vae"] = "haar"
    drawn["model"] = {"dit": drawn["model"]["dit"], "noise_expert": "high"}
    with pytest.raises(WanmoeError, match="trains the high-noise one alone"):
        parse_config(drawn, "test")


def test_names_become_files():
    assert file_name("Hook/Electrocautery") == "hook-electrocautery"
    assert file_name("../电凝钩") == "---电凝钩"
