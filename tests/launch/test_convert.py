"""`wanmoe convert` and `wanmoe inspect`: every format there and back, and one line for what cannot be."""

import json
import sys

import pytest
import torch

from wanmoe.launch import cli
from wanmoe.moe_lora import AdapterConfig, attach, load_adapter, load_dit, save_adapter
from wanmoe.moe_lora.adapter_file import read_adapter
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import save_dit

HOOK = "Hook/Electrocautery"
CONFIG = WanConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, text_dim=12, text_len=8, freq_dim=16)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random base model, and an adapter of it for each side."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    dit = WanDiT(CONFIG)
    torch.nn.init.normal_(dit.head.head.weight, std=0.2)
    save_dit(dit, folder / "dit.safetensors")
    for side in ("low", "high"):
        model = load_dit(folder / "dit.safetensors")
        adapter = attach(model, AdapterConfig(blocks=2, ffn_blocks=1), seed=len(side))
        for name, parameter in adapter.parameters().items():
            if name.endswith("_up"):
                torch.nn.init.normal_(parameter, std=0.1)
        save_adapter(adapter, folder / f"{side}.safetensors", stage="b", step=3, noise_expert=side)
    return folder


def run(monkeypatch, capsys, *words):
    """(exit code, standard output, last line of standard error) of `wanmoe words`."""
    monkeypatch.setattr(sys, "argv", ["wanmoe", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, (captured.err.strip().splitlines() or [""])[-1]


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *words: run(monkeypatch, capsys, *words)


def output(dit, adapter=None, column=1, **alphas):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.tensor([0.9])
    context = [torch.randn(5, 12, generator=generator)]
    experts = torch.eye(4)[[column]]
    gates = None if adapter is None else adapter.gates(experts, t, tokens=12, **alphas)
    with torch.no_grad():
        return dit(x, t, context, gates)


def test_an_export_comes_back_and_does_the_same(files, command, tmp_path):
    dit = load_dit(files / "dit.safetensors")
    truth = output(dit, load_adapter(files / "low.safetensors", dit), alpha_base=0.7)
    out = tmp_path / "hook.safetensors"
    base = ("--dit", files / "dit.safetensors")
    code, said, error = command(
        "convert", files / "low.safetensors", "--to", "comfyui", "--instrument", "bipolar",
        "--alpha-base", 0.7, "--out", out,
    )  # fmt: skip
    assert code == 0, error
    assert "17 linears of rank 16, exact" in said and "bands over t are not in it" in said

    config = tmp_path / "a.toml"
    config.write_text("[adapter]\nblocks = 2\nffn_blocks = 1\n")
    code, said, error = command(
        "convert", out, "--to", "wanmoe", *base, "--config", config, "--out", tmp_path / "back.safetensors"
    )
    assert code == 0, error
    assert "low noise, 17 linears" in said and "stage a" in said
    back = load_dit(files / "dit.safetensors")
    adapter = load_adapter(tmp_path / "back.safetensors", back)
    torch.testing.assert_close(output(back, adapter), truth, rtol=0, atol=1e-5)

    code, said, error = command(
        "convert", files / "low.safetensors", "--to", "merged", *base, "--instrument", HOOK,
        "--alpha-base", 0.7, "--out", tmp_path / "merged.safetensors",
    )  # fmt: skip
    assert code == 0, error
    merged = load_dit(tmp_path / "merged.safetensors")
    torch.testing.assert_close(output(merged), truth, rtol=0, atol=1e-5)


def test_two_sides_make_two_files(files, command, tmp_path):
    both = (files / "high.safetensors", files / "low.safetensors")
    for to, name in (("diffusers", "x.safetensors"), ("peft", "x")):
        code, said, error = command(
            "convert", *both, "--to", to, "--mix", "hook=1", "--rank", 2, "--out", tmp_path / name
        )
        assert code == 0, error
        assert said.count("rank 2, error") == 2
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"x_high.safetensors", "x_low.safetensors", "x_high", "x_low"}


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "peft"])
def test_inspect_knows_what_convert_writes(files, command, tmp_path, to):
    out = tmp_path / ("x" if to == "peft" else "x.safetensors")
    assert command("convert", files / "high.safetensors", "--to", to, "--out", out)[0] == 0
    code, said, error = command("inspect", out, "--json")
    assert code == 0, error
    report = json.loads(said)
    assert to in report["format"].lower() and report["noise_expert"] == "high"
    assert report["ranks"]["lora"]["q"] == [8] and len(report["sha256"]) == 64


def test_inspect_tells_an_adapter_from_its_model(files, command):
    code, said, _ = command("inspect", files / "low.safetensors")
    assert code == 0
    for word in ("wanmoe-adapter/1", "t2v", "low", HOOK, "rank of base", "sha256"):
        assert word in said
    code, said, _ = command("inspect", files / "dit.safetensors")
    assert code == 0 and "Wan DiT" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("low.safetensors", "--to", "merged"), "--to merged needs --dit"),
        (("low.safetensors", "--to", "wanmoe"), "is an adapter of wanmoe already"),
        (("dit.safetensors", "--to", "comfyui"), "none of a LoRA on Wan"),
        (("low.safetensors", "--to", "comfyui", "--instrument", "stapler"), "unknown expert 'stapler'"),
        (("low.safetensors", "low.safetensors", "--to", "comfyui"), "belong to the noise experts low, low"),
        (
            ("low.safetensors", "--to", "comfyui", "--instrument", "hook", "--mix", "hook=1"),
            "exclude each other",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_line(files, command, tmp_path, words, message):
    words = [files / word if word.endswith(".safetensors") else word for word in words]
    code, _, error = command("convert", *words, "--out", tmp_path / "x.safetensors")
    assert code == 2 and message in error
    assert not list(tmp_path.iterdir())


def test_garbage_is_one_line(command, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"garbage" * 100)
    code, said, error = command("inspect", tmp_path / "x.safetensors")
    assert code == 2 and said == "" and "x.safetensors" in error


def test_an_imported_base_names_the_side_it_was_told(files, command, tmp_path):
    lora = tmp_path / "style.safetensors"
    assert command("convert", files / "low.safetensors", "--to", "diffusers", "--out", lora)[0] == 0
    config = tmp_path / "a.toml"
    config.write_text("[adapter]\nblocks = 2\nffn_blocks = 1\nrank_q = 2\n")
    code, _, error = command(
        "convert", lora, "--to", "wanmoe", "--dit", files / "dit.safetensors", "--base", "svd",
        "--config", config, "--noise-expert", "high", "--out", tmp_path / "a.safetensors",
    )  # fmt: skip
    assert code == 0, error
    info, tensors = read_adapter(tmp_path / "a.safetensors")
    assert info.noise_expert == "high" and tensors["blocks.2.self_attn.q.base_down"].shape == (2, 24)
