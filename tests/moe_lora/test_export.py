"""Adapters and LoRAs written for other tools: what stands in the files, what was lost, what is refused."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanmoe.moe_lora import (
    AdapterConfig,
    RouterConfig,
    WanmoeError,
    attach,
    import_adapter,
    load_dit,
    save_adapter,
)
from wanmoe.moe_lora.export import export_lora, export_merged, gates_of, merge_lora, rewrite_lora
from wanmoe.moe_lora.lora_file import read_lora
from wanmoe.moe_lora.lora_merge import LoRASpec
from wanmoe.moe_lora.routing import RuleRouter
from wanmoe.moe_lora.wan.weights import dit_hash, save_dit

DIM, FFN = 24, 40
MIX = {"Scissors": 0.25, "Suction": 0.75}


def kohya_file(path, ranks=(6,), **more):
    """A vanilla LoRA on two linears of four blocks, alpha half its rank."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for block in range(4):
        for linear, d_out in (("self_attn_q", DIM), ("ffn_0", FFN)):
            rank, name = ranks[block % len(ranks)], f"lora_unet_blocks_{block}_{linear}"
            tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(rank, DIM, generator=generator)
            tensors[f"{name}.lora_up.weight"] = 0.3 * torch.randn(d_out, rank, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors | more, path)
    return path


def test_a_cut_export_is_the_best_of_its_rank_and_says_what_it_lost(saved, tmp_path):
    _, path = saved
    exact, cut = tmp_path / "exact.safetensors", tmp_path / "cut.safetensors"
    assert export_lora(path, exact, gates=MIX).rank == 12
    report = export_lora(path, cut, gates=MIX, rank=5)
    assert report.rank == 5
    lost = total = 0.0
    reduced = read_lora(cut).deltas
    for name, delta in read_lora(exact).deltas.items():
        down, up = (factor.double() for factor in delta.factors())
        small_down, small_up = (factor.double() for factor in reduced[name].factors())
        values = torch.linalg.svdvals(up @ down)
        difference = (up @ down - small_up @ small_down).square().sum()
        torch.testing.assert_close(difference, values[5:].square().sum(), rtol=1e-4, atol=1e-8)
        lost, total = lost + difference.item(), total + values.square().sum().item()
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-4) and report.error > 0.01
    # A linear whose sum has less rank than asked for is exact.
    assert export_lora(path, cut, gates=MIX, rank=12).error == 0.0


def test_the_file_says_where_it_comes_from(saved, tmp_path):
    _, path = saved
    out = tmp_path / "out.safetensors"
    export_lora(path, out, gates={"bipolar": 0.5}, alpha_base=0.5, dtype=torch.bfloat16)
    file = read_lora(out)
    assert file.noise_expert == "high" and json.loads(file.metadata["gates"]) == {"bipolar": 0.5}
    source = json.loads(file.metadata["wanmoe_source"])
    assert (source["adapter"], source["alpha_base"], source["stage"]) == ("adapter.safetensors", 0.5, "b")
    assert source["base_sha256"] == "ab" * 32 and len(source["sha256"]) == 64
    assert {value.dtype for value in load_file(out).values()} == {torch.bfloat16}


def test_parts_without_weight_or_training_do_not_widen_the_rank(saved, dit, tmp_path):
    adapter, _ = saved
    for module in adapter.modules.values():
        module.expert_up.data[adapter.experts.index("Other")] = 0
    path = save_adapter(adapter, tmp_path / "adapter.safetensors", stage="b", step=3)
    out = tmp_path / "out.safetensors"
    assert export_lora(path, out, gates={"Other": 1.0, "Scissors": 0.0, "Suction": 1.0}).rank == 8
    assert export_lora(path, out, gates={"Other": 1.0, "Suction": 1.0}, alpha_base=0).rank == 4
    with pytest.raises(WanmoeError, match=r"adapter.safetensors: this mix changes nothing: .*'Other': 1.0"):
        export_lora(path, out, gates={"Other": 1.0}, alpha_base=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gates": {"laser": 1.0}}, "unknown expert 'laser'"),
        ({"gates": {"Suction": float("nan")}}, "the weight of 'Suction' must be finite, got nan"),
        ({"rank": 0}, "export to rank 0: it must be at least 1"),
        ({"format": "peft"}, "a PEFT LoRA is a folder"),
    ],
)
def test_an_export_that_cannot_be_is_refused(saved, arguments, words, tmp_path):
    with pytest.raises(WanmoeError, match=words):
        export_lora(saved[1], tmp_path / "out.safetensors", **arguments)
    assert not (tmp_path / "out.safetensors").exists()


def test_an_adapter_is_merged_into_its_own_base_alone(saved, frozen, monkeypatch, tmp_path):
    adapter, path = saved
    base = tmp_path / "base.safetensors"
    save_dit(frozen, base)
    monkeypatch.setattr("wanmoe.moe_lora.export.load_dit", lambda *_a, **_k: pytest.fail("it was read"))
    with pytest.raises(WanmoeError, match=r"adapter.*trained on base abababababab, .*base.safetensors is "):
        export_merged(path, base, tmp_path / "out.safetensors")
    monkeypatch.undo()
    trained = save_adapter(
        adapter, tmp_path / "own.safetensors", stage="b", step=3, base_sha256=dit_hash(base)
    )
    assert export_merged(trained, base, tmp_path / "out.safetensors") == 17


def test_strengths_and_factors_that_are_not_finite_are_refused(saved, frozen, tmp_path):
    adapter, path = saved
    out = tmp_path / "out.safetensors"
    with pytest.raises(WanmoeError, match="alpha_base must be finite, got inf"):
        export_lora(path, out, alpha_base=float("inf"), rank=2)
    with pytest.raises(WanmoeError, match="alpha_expert must be finite, got nan"):
        export_lora(path, out, gates=MIX, alpha_expert=float("nan"))
    with pytest.raises(WanmoeError, match=r"in float16: holds values that are not finite"):
        export_lora(path, out, alpha_base=1e6, dtype=torch.float16)
    adapter.modules["blocks.2.self_attn.q"].base_down.data[0, 0] = float("nan")
    bad = save_adapter(adapter, tmp_path / "bad.safetensors", stage="b", step=3)
    for rank in (None, 2):
        with pytest.raises(WanmoeError, match=r"bad.*blocks.2.self_attn.q: holds values that are not finite"):
            export_lora(bad, out, rank=rank)
    assert not out.exists()
    nan = {"lora_unet_blocks_3_ffn_0.lora_up.weight": torch.full((FFN, 6), float("nan"))}
    lora = kohya_file(tmp_path / "lora.safetensors", **nan)
    for base in ("svd", "keep"):
        with pytest.raises(WanmoeError, match=r"lora.*blocks.3.ffn.0: holds values that are not finite"):
            import_adapter(lora, copy.deepcopy(frozen), config=AdapterConfig(blocks=2), base=base)
    with pytest.raises(WanmoeError, match=r"lora.*blocks.3.ffn.0: holds values that are not finite"):
        rewrite_lora(lora, out)


@pytest.mark.parametrize("lost", ["blocks.3.ffn.0.", "blocks.2.self_attn.q.expert_up", "blocks.3.", "blocks"])
def test_an_adapter_file_with_missing_tensors_is_not_exported(saved, lost, tmp_path):
    _, path = saved
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    kept = {name: value for name, value in load_file(path).items() if not name.startswith(lost)}
    save_file(kept, tmp_path / "cut.safetensors", metadata=metadata)
    with pytest.raises(WanmoeError, match=r"cut.safetensors: \d+ tensors that it says it has are missing: "):
        export_lora(tmp_path / "cut.safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "peft"])
def test_a_plain_lora_is_rewritten_with_its_scale_in_the_factors(layout, tmp_path):
    path = kohya_file(tmp_path / "lora_low.safetensors", ranks=(6, 4))
    out = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    report = rewrite_lora(path, out, format=layout)
    assert report == (layout, 6, 8, 0.0, torch.float32)
    found = read_lora(out)
    assert (found.format, found.noise_expert) == (layout, "low")
    for name, delta in read_lora(path).deltas.items():
        (down, up), (new_down, new_up) = delta.factors(), found.deltas[name].factors()
        torch.testing.assert_close(found.deltas[name].scale * new_up @ new_down, 0.5 * up @ down)
    assert rewrite_lora(path, out, format=layout, noise_expert="high", dtype=torch.bfloat16).dtype == (
        torch.bfloat16
    )
    assert read_lora(out).noise_expert == "high"


def test_a_plain_lora_with_full_differences_is_not_rewritten(tmp_path):
    path = kohya_file(tmp_path / "lora.safetensors", **{"lora_unet_blocks_0_norm3.diff": torch.zeros(DIM)})
    with pytest.raises(WanmoeError, match=r"changes blocks.0.norm3 by full differences .*--to merged"):
        rewrite_lora(path, tmp_path / "out.safetensors")


def test_a_plain_lora_merged_into_a_file_is_the_one_merged_at_load(frozen, tmp_path):
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_dit(frozen, base)
    spec = LoRASpec(kohya_file(tmp_path / "lora_high.safetensors"))
    assert merge_lora(spec, base, out) == 8
    wanted = load_dit(base, loras=[spec]).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in load_dit(out).state_dict().items())
    with safe_open(out, "pt") as handle:
        said = handle.metadata()
    assert said["noise_expert"] == "high"
    assert json.loads(said["wanmoe_source"])["lora"] == "lora_high.safetensors"


@pytest.mark.parametrize("time_gate", ["bands", "contrast", "learned"])
@pytest.mark.parametrize(("side", "t"), [("high", 1.0), ("low", 0.875)])
def test_gates_of_an_export_are_those_of_generation(dit, tmp_path, time_gate, side, t):
    adapter = attach(dit, AdapterConfig(blocks=2, ffn_blocks=1), RouterConfig(time_gate=time_gate))
    if adapter.time_gate is not None:
        adapter.time_gate.center.data += torch.linspace(0, 0.3, len(adapter.experts))
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage="b", step=1, noise_expert=side)
    names = adapter.experts.names
    for asked, routed in (
        ({"instrument": names[1]}, {names[1]: 1.0}),
        ({"mix": {names[0]: 3.0, names[1]: 1.0}}, {names[0]: 0.75, names[1]: 0.25}),
        ({}, {}),
    ):
        row = torch.tensor([[routed.get(name, 0.0) for name in names]])
        truth = adapter.gates(row, torch.tensor([t]), tokens=4).experts[0].tolist()
        found = gates_of(path, **asked)
        assert [found.get(name, 0.0) for name in names] == pytest.approx(truth, abs=1e-5)
        assert bool(found) == (bool(asked) or time_gate == "contrast")


def test_an_export_without_an_instrument_asks_the_fallback_expert_as_a_prompt_without_one_does(dit, tmp_path):
    adapter = attach(dit, AdapterConfig(blocks=2, ffn_blocks=1, fallback="Suction"), RouterConfig())
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage="b", step=1)
    routed = RuleRouter(adapter.experts).route(prompt="a calm view")
    truth = adapter.gates(routed[None], torch.ones(1), tokens=4).experts[0].tolist()
    assert gates_of(path) == {"Suction": 1.0}
    assert truth == [float(name == "Suction") for name in adapter.experts.names]
