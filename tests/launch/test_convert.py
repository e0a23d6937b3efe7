"""`wanmoe convert` and `wanmoe inspect`: every format there and back, and one line for what cannot be."""

import json
import os
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanmoe.launch import cli
from wanmoe.moe_lora import AdapterConfig, RouterConfig, attach, load_adapter, load_dit, save_adapter
from wanmoe.moe_lora.adapter_file import read_adapter
from wanmoe.moe_lora.lora_file import read_lora
from wanmoe.moe_lora.lora_merge import LoRASpec
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import dit_hash, save_dit

HOOK = "Hook/Electrocautery"
CONFIG = WanConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, text_dim=12, text_len=8, freq_dim=16)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random models of both sides, an adapter of each, a plain LoRA, and a file of the fork."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    bases = {"low": folder / "dit.safetensors", "high": folder / "dit_high.safetensors"}
    for path in bases.values():
        dit = WanDiT(CONFIG)
        torch.nn.init.normal_(dit.head.head.weight, std=0.2)
        save_dit(dit, path)
    for side in ("low", "high"):
        model = load_dit(bases[side])
        adapter = attach(model, AdapterConfig(blocks=2, ffn_blocks=1), seed=len(side))
        for name, parameter in adapter.parameters().items():
            if name.endswith("_up"):
                torch.nn.init.normal_(parameter, std=0.1)
        about = {"noise_expert": side, "base_sha256": dit_hash(bases[side])}
        save_adapter(adapter, folder / f"{side}.safetensors", stage="b", step=3, **about)
    name = "lora_unet_blocks_1_self_attn_q"
    style = {f"{name}.lora_down.weight": torch.randn(2, 24), f"{name}.lora_up.weight": torch.randn(24, 2)}
    save_file({**style, f"{name}.alpha": torch.tensor(1.0)}, folder / "style.safetensors")
    parts = {"base_lora_down": (2, 24), "base_lora_up": (24, 2)}
    parts |= {"expert_lora_down.0": (2, 24), "expert_lora_up.0": (24, 2)}
    fork = {f"lora_moe_0.{part}.weight": torch.ones(shape) for part, shape in parts.items()}
    save_file(fork, folder / "fork.safetensors")
    (folder / "fork.json").write_text(
        '{"alpha": 1.0, "expert_names": ["hook"], "module_ranks": {"blocks.2.attn1.q": 2}}'
    )
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
    assert "17 linears of rank 16, exact" in said and "time gate is not in it" in said

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
        (("low.safetensors", "--to", "comfyui", "--instrument", "graspr"), "nearest is 'grasper'"),
        (("low.safetensors", "--to", "comfyui", "--mix", "hook=1, Suction=1"), "--mix once for each expert"),
        (("low.safetensors", "low.safetensors", "--to", "comfyui"), "belong to the noise experts low, low"),
        (
            ("low.safetensors", "high.safetensors", "--to", "merged", "--dit", "dit.safetensors"),
            "needs --dit and --dit_high_noise",
        ),
        (
            ("high.safetensors", "--to", "merged", "--dit", "dit.safetensors"),
            "pass any_base (--any_base) to merge it all the same",
        ),
        (
            ("low.safetensors", "--to", "merged", "--dit-high-noise", "dit.safetensors"),
            "needs --dit, the model",
        ),
        (("fork.safetensors", "--to", "comfyui"), "a LoRA-MoE file of the fork; import it with --to wanmoe"),
        (
            ("low.safetensors", "--to", "comfyui", "--alpha-expert", "2"),
            "--alpha_expert does nothing without",
        ),
        (("low.safetensors", "--to", "comfyui", "--mix", "hook=-1"), "must be finite and not negative"),
        (("low.safetensors", "--to", "comfyui", "--alpha-base", "nan"), "alpha_base must be finite, got nan"),
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


@pytest.mark.parametrize(
    ("stage", "router", "fallback", "said", "unsaid"),
    [
        ("b+base", {"bands": [[0, 1]], "floor": 0.5}, None, "so all experts alike", "time gate is not in it"),
        ("b+base", {"time_gate": "contrast"}, None, "time gate is not in it", "never trained"),
        ("b", {}, "Suction", "no instrument, so its fallback expert Suction", "all experts alike"),
        ("a", {}, "Suction", "its experts were never trained, so without effect", "experts alike"),
    ],
)
def test_what_an_export_without_an_instrument_holds_is_said(
    files, tmp_path, monkeypatch, capsys, stage, router, fallback, said, unsaid
):
    config = AdapterConfig(blocks=2, ffn_blocks=1, fallback=fallback)
    adapter = attach(load_dit(files / "dit.safetensors"), config, RouterConfig(**router))
    for name, parameter in adapter.parameters().items():
        if name.endswith("_up"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage=stage, step=1)
    monkeypatch.setattr(
        sys,
        "argv",
        ["wanmoe", "convert", str(path), "--to", "comfyui", "--out", str(tmp_path / "x.safetensors")],
    )
    with pytest.raises(SystemExit):
        cli.main()
    told = "".join(capsys.readouterr())
    assert said in told and unsaid not in told


def test_a_source_that_is_not_there_is_told_before_its_options(command, tmp_path):
    words = (
        "nope.safetensors",
        "--to",
        "comfyui",
        "--instrument",
        "hook",
        "--out",
        tmp_path / "x.safetensors",
    )
    code, _, error = command("convert", *words)
    assert code == 2 and "nope.safetensors: no such file or folder" in error


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


IDLE = [
    ("low", "merged", ("rank 2", "base svd", "fold-timestep", "config a.toml", "noise-expert low")),
    (
        "low",
        "peft",
        ("dit x", "dit-high-noise x", "any-base", "base keep", "config a.toml", "noise-expert low"),
    ),
    ("style", "wanmoe", ("alpha-base 1.0", "alpha-expert 1.0", "rank 2", "instrument hook", "mix hook=1")),
    ("style", "wanmoe", ("fold-timestep", "lora-moe-config-file x", "any-base")),
    ("style", "merged", ("instrument hook", "mix hook=1", "alpha-base 2", "rank 2", "base svd", "any-base")),
    ("style", "comfyui", ("instrument hook", "mix hook=1", "rank 2", "dit x")),
    ("fork", "wanmoe", ("base svd", "config a.toml", "mix hook=1", "rank 2")),
]


@pytest.mark.parametrize(
    ("source", "to", "option"), [(source, to, option) for source, to, row in IDLE for option in row]
)
def test_options_that_would_do_nothing_are_refused(files, command, tmp_path, source, to, option):
    code, _, error = command(
        "convert", files / f"{source}.safetensors", "--to", to, "--out", tmp_path / "x.safetensors",
        *f"--{option}".split(),
    )  # fmt: skip
    name = option.split()[0].replace("-", "_")
    assert code == 2 and f"does nothing with --{name}; leave it out" in error, error


def test_each_side_is_merged_into_its_own_model(files, command, tmp_path):
    models = ("--dit", files / "dit.safetensors", "--dit-high-noise", files / "dit_high.safetensors")
    both = (files / "high.safetensors", files / "low.safetensors")
    words = ("--to", "merged", "--instrument", HOOK, *models)
    code, _, error = command("convert", *both, *words, "--out", tmp_path / "x.safetensors")
    assert code == 0, error
    code, _, error = command("convert", both[0], *words, "--out", tmp_path / "alone.safetensors")
    assert code == 0, error
    single = ("--to", "merged", "--instrument", HOOK, "--dit", files / "dit_high.safetensors")
    code, _, error = command("convert", both[0], *single, "--out", tmp_path / "single.safetensors")
    assert code == 0, error
    sides = {"low": "dit", "high": "dit_high"}
    for side, base in sides.items():
        dit = load_dit(files / f"{base}.safetensors")
        truth = output(dit, load_adapter(files / f"{side}.safetensors", dit))
        torch.testing.assert_close(
            output(load_dit(tmp_path / f"x_{side}.safetensors")), truth, rtol=0, atol=1e-5
        )
    for name in ("alone", "single"):
        assert torch.equal(
            output(load_dit(tmp_path / f"{name}.safetensors")),
            output(load_dit(tmp_path / "x_high.safetensors")),
        )
    other = ("--to", "merged", "--dit", files / "dit.safetensors", "--any-base")
    code, _, error = command("convert", both[0], *other, "--out", tmp_path / "other.safetensors")
    assert code == 0, error


@pytest.mark.parametrize("name", ["low", "dit", "link", "high", "a.toml"])
def test_nothing_that_is_read_is_written_over(files, command, tmp_path, name):
    own = {n: tmp_path / f"{n}.safetensors" for n in ("low", "high", "dit", "dit_high", "style")}
    for path in own.values():
        path.write_bytes((files / path.name).read_bytes())
    (tmp_path / "link.safetensors").symlink_to(own["dit"])
    (tmp_path / "a.toml").write_text("[adapter]\nblocks = 2\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    models = ("--dit", own["dit"], "--dit-high-noise", own["dit_high"])
    words = {
        "low": (own["low"], "--to", "comfyui", "--out", own["low"]),
        "dit": (own["low"], "--to", "merged", *models[:2], "--out", own["dit"]),
        "link": (own["low"], "--to", "merged", *models[:2], "--out", tmp_path / "link.safetensors"),
        "high": (own["low"], own["dit"].with_name("high.safetensors"), "--to", "merged", *models, "--out",
                 tmp_path / "dit.safetensors"),
        "a.toml": (own["style"], "--to", "wanmoe", *models[:2], "--config", tmp_path / "a.toml", "--out",
                   tmp_path / "a.toml"),
    }[name]  # fmt: skip
    code, _, error = command("convert", *words)
    assert code == 2 and "that is a file which is read; give another name" in error, error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_shard_of_the_model_is_not_written_over(files, command, tmp_path):
    state = load_file(files / "dit.safetensors")
    with safe_open(files / "dit.safetensors", "pt") as handle:
        metadata = handle.metadata()
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "model" / "m.safetensors", metadata=metadata)
    code, _, error = command(
        "convert", files / "low.safetensors", "--to", "merged", "--dit", tmp_path / "model", "--any-base",
        "--out", tmp_path / "model" / "m.safetensors",
    )  # fmt: skip
    assert code == 2 and "a file which is read" in error


def test_a_mix_is_scaled_as_generate_scales_it_and_no_mix_is_said(files, command, tmp_path):
    out = tmp_path / "x.safetensors"
    words = ("convert", files / "low.safetensors", "--to", "comfyui", "--out", out)
    code, said, _ = command(*words, "--mix", "hook=3", "--mix", "Suction=1")
    assert code == 0 and "exact\n" in said and "left out" not in said
    assert json.loads(read_lora(out).metadata["gates"]) == {HOOK: 0.75, "Suction": 0.25}
    code, said, _ = command(*words, "--dtype", "bf16")
    assert code == 0 and "base adapter alone, 4 experts left out" in said
    assert "exact in float32, rounded to bfloat16" in said
    assert {value.dtype for value in load_file(out).values()} == {torch.bfloat16}


def test_a_plain_lora_goes_into_a_model_or_to_another_tool(files, command, tmp_path):
    style, base = files / "style.safetensors", files / "dit.safetensors"
    out = tmp_path / "merged.safetensors"
    code, said, error = command("convert", style, "--to", "merged", "--dit", base, "--out", out)
    assert code == 0, error
    assert "1 layers" in said
    truth = load_dit(base, loras=[LoRASpec(style)])
    assert torch.equal(output(load_dit(out)), output(truth))
    half = tmp_path / "half.safetensors"
    code, said, error = command("convert", style, "--to", "comfyui", "--dtype", "fp16", "--out", half)
    assert code == 0, error
    assert "1 linears of rank 2, exact in float32, rounded to float16" in said
    assert {value.dtype for value in load_file(half).values()} == {torch.float16}
    code, _, error = command(
        "convert", style, "--to", "peft", "--noise-expert", "high", "--out", tmp_path / "p"
    )
    assert code == 0, error
    assert read_lora(tmp_path / "p").noise_expert == "high"
    code, _, error = command("convert", style, "--to", "peft", "--out", tmp_path / "p.mp4")
    assert code == 2 and "a PEFT LoRA is a folder" in error


def test_a_side_that_is_named_wins_over_what_the_file_says(files, command, tmp_path):
    with safe_open(files / "style.safetensors", "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    lora = tmp_path / "lora_low.safetensors"
    save_file(tensors, lora, metadata={"noise_expert": "upper"})
    config = tmp_path / "a.toml"
    config.write_text("[adapter]\nblocks = 2\nffn_blocks = 1\n")
    words = (
        "convert",
        lora,
        "--to",
        "wanmoe",
        "--dit",
        files / "dit.safetensors",
        "--config",
        config,
        "--out",
    )
    code, _, error = command(*words, tmp_path / "a.safetensors")
    assert code == 2 and "noise expert 'upper'" in error and "--noise_expert high" in error
    code, _, error = command(*words, tmp_path / "a.safetensors", "--noise-expert", "high", "--dtype", "bf16")
    assert code == 0, error
    info, values = read_adapter(tmp_path / "a.safetensors")
    assert info.noise_expert == "high" and {value.dtype for value in values.values()} == {torch.bfloat16}


def test_a_file_of_the_fork_with_its_config_beside_it(files, command, tmp_path):
    config = ("--lora-moe-config-file", files / "fork.json")
    code, said, _ = command("inspect", files / "fork.safetensors")
    assert code == 0 and "1, not named" in said and "--lora_moe_config_file" in said
    code, said, _ = command("inspect", files / "fork.safetensors", *config)
    assert code == 0 and "hook" in said and "1 in blocks 2" in said
    code, _, error = command(
        "convert", files / "fork.safetensors", "--to", "wanmoe", "--dit", files / "dit.safetensors", *config,
        "--fold-timestep", "--out", tmp_path / "a.safetensors",
    )  # fmt: skip
    assert code == 0, error
    assert read_adapter(tmp_path / "a.safetensors")[0].adapter.expert_set.names == ["hook"]


def test_a_model_that_is_called_by_the_other_side_is_not_merged_into(files, command, tmp_path):
    model = tmp_path / "dit_high_noise.safetensors"
    model.write_bytes((files / "dit.safetensors").read_bytes())
    words = ("convert", files / "low.safetensors", "--to", "merged", "--dit", model, "--instrument", "hook")
    code, _, error = command(*words, "--out", tmp_path / "m.safetensors")
    assert code == 2 and "belongs to the low noise expert" in error and "is high by its name" in error
    assert command(*words, "--any_base", "--out", tmp_path / "m.safetensors")[0] == 0
    code, said, _ = command("inspect", tmp_path / "m.safetensors")
    assert code == 0 and "merged from" in said and "low.safetensors" in said and HOOK in said
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
