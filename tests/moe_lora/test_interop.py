"""Adapters through other tools' files and back: the foreign model computes what ours computes."""

import copy
import hashlib
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline, WanTransformer3DModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanmoe.moe_lora import (
    AdapterConfig,
    Expert,
    RouterConfig,
    WanmoeError,
    attach,
    load_adapter,
    load_dit,
    save_adapter,
)
from wanmoe.moe_lora.adapter import LoRAMoELinear
from wanmoe.moe_lora.export import export_lora, export_merged
from wanmoe.moe_lora.interop import FORK_TIMESTEP_GATE, import_adapter
from wanmoe.moe_lora.lora_file import read_lora
from wanmoe.moe_lora.routing import Gates
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import save_dit, to_diffusers

DIM, FFN, TEXT = 24, 40, 8
CONFIG = AdapterConfig(blocks=2, ffn_blocks=1, rank_q=3, rank_k=2, rank_v=2, rank_o=1, rank_ffn=4, alpha=3.0)
MIX = {"Scissors": 0.25, "Suction": 0.75}
ONE_BAND = RouterConfig(bands=((0.0, 1.0),))


def randomised(adapter, std=0.3):
    torch.manual_seed(7)
    for parameter in adapter.parameters().values():
        torch.nn.init.normal_(parameter, std=std)
    return adapter


def gates(adapter, clip, mix=None, alpha_base=1.0, alpha_expert=1.0):
    row = torch.zeros(len(adapter.experts))
    for name, weight in (mix or {}).items():
        row[adapter.experts.index(name)] = weight
    rows = row.repeat(len(clip["t"]), 1)
    return adapter.gates(rows, clip["t"], tokens=12, alpha_base=alpha_base, alpha_expert=alpha_expert)


def ours(adapter, clip, mix=None, **alphas):
    with torch.no_grad():
        return adapter.dit(clip["x"], clip["t"], clip["context"], gates(adapter, clip, mix, **alphas))


def diffusers_model(frozen):
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=12, freq_dim=16, ffn_dim=FFN, num_layers=4,
    )  # fmt: skip
    model.load_state_dict({to_diffusers(name): value for name, value in frozen.state_dict().items()})
    return model.eval()


def theirs(model, clip):
    context = torch.stack([F.pad(row, (0, 0, 0, TEXT - len(row))) for row in clip["context"]])
    with torch.no_grad():
        return model(clip["x"], 1000 * clip["t"], context, return_dict=False)[0]


def close(found, expected, frozen_output):
    """Within 1e-5 of the largest value, where the adapter changed at least 1000 times as much."""
    largest = expected.abs().max().item()
    assert (expected - frozen_output).abs().max() > 0.01 * largest
    assert (found - expected).abs().max() <= 1e-5 * largest


def without_adapter(frozen, clip):
    with torch.no_grad():
        return frozen(clip["x"], clip["t"], clip["context"])


@pytest.mark.parametrize("mix", [None, {"Hook/Electrocautery": 1.0}, MIX])
def test_diffusers_computes_what_ours_does(saved, frozen, clip, mix, tmp_path):
    adapter, path = saved
    report = export_lora(path, tmp_path / "out.safetensors", format="diffusers", gates=mix)
    assert report.linears == 17 and report.error == 0.0 and report.format == "diffusers"
    assert report.rank == 4 * (1 + len(mix or ()))
    model = diffusers_model(frozen)
    plain = theirs(model, clip)
    model.load_lora_adapter(load_file(tmp_path / "out.safetensors"), prefix="transformer")
    close(theirs(model, clip), ours(adapter, clip, mix), plain)


def test_a_wan_pipeline_reads_the_comfyui_file(saved, frozen, clip, tmp_path):
    adapter, path = saved
    export_lora(path, tmp_path / "out.safetensors", gates=MIX, alpha_base=0.7, alpha_expert=1.3)
    assert all(name.startswith("diffusion_model.blocks.") for name in load_file(tmp_path / "out.safetensors"))
    state = WanPipeline.lora_state_dict(tmp_path / "out.safetensors")
    model = diffusers_model(frozen)
    plain = theirs(model, clip)
    WanPipeline.load_lora_into_transformer(state, model, adapter_name="mix")
    expected = ours(adapter, clip, MIX, alpha_base=0.7, alpha_expert=1.3)
    close(theirs(model, clip), expected, plain)


def test_peft_computes_what_ours_does(saved, frozen, clip, tmp_path):
    adapter, path = saved
    export_lora(path, tmp_path / "out", format="peft", gates=MIX)
    model = diffusers_model(frozen)
    plain = theirs(model, clip)
    close(
        theirs(PeftModel.from_pretrained(model, tmp_path / "out").eval(), clip),
        ours(adapter, clip, MIX),
        plain,
    )


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "peft"])
def test_an_export_kept_as_base_computes_what_was_exported(saved, frozen, clip, layout, tmp_path):
    adapter, path = saved
    out = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    export_lora(path, out, format=layout, gates=MIX)
    plain = without_adapter(frozen, clip)
    again = import_adapter(out, frozen, config=CONFIG, noise_expert="high")
    assert {module.base_down.shape[0] for module in again.modules.values() if not module.experts} <= {12}
    close(ours(again, clip), ours(adapter, clip, MIX), plain)


def product(module):
    return module.scale_base * module.base_up @ module.base_down


def test_import_of_export_is_the_same_change_for_every_linear(saved, frozen, tmp_path):
    adapter, path = saved
    export_lora(path, tmp_path / "out.safetensors")
    config = CONFIG.model_copy(update={"blocks": 1, "ffn_blocks": 0})
    again = import_adapter(tmp_path / "out.safetensors", frozen, config=config)
    assert set(again.modules) == set(adapter.modules)
    for name, module in adapter.modules.items():
        torch.testing.assert_close(product(again.modules[name]), product(module), rtol=1e-5, atol=1e-6)
    # Those in blocks that `config` adapts carry fresh experts, the others the base alone.
    experts = {name: module.experts for name, module in again.modules.items()}
    assert {n for n, count in experts.items() if count} == {
        n for n in experts if "3." in n and "ffn" not in n
    }
    assert not any(module.expert_up.any() for module in again.modules.values())
    assert again.config.base_ranks["blocks.2.self_attn.q"] == 4


def test_an_imported_adapter_saves_and_loads(saved, frozen, clip, tmp_path):
    adapter, path = saved
    export_lora(path, tmp_path / "out.safetensors", gates=MIX)
    bare = copy.deepcopy(frozen)
    plain = without_adapter(frozen, clip)
    again = import_adapter(tmp_path / "out.safetensors", frozen, config=CONFIG)
    file = save_adapter(again, tmp_path / "again.safetensors", stage="a", step=0)
    close(ours(load_adapter(file, bare), clip), ours(adapter, clip, MIX), plain)


def test_a_merged_model_computes_what_the_adapter_does(saved, frozen, clip, tmp_path):
    adapter, path = saved
    save_dit(frozen, tmp_path / "base.safetensors")
    changed = export_merged(
        path,
        tmp_path / "base.safetensors",
        tmp_path / "merged.safetensors",
        gates=MIX,
        alpha_base=0.5,
        any_base=True,
    )
    assert changed == 17
    merged = load_dit(tmp_path / "merged.safetensors")
    expected = ours(adapter, clip, MIX, alpha_base=0.5)
    close(without_adapter(merged, clip), expected, without_adapter(frozen, clip))
    assert merged.config == frozen.config
    half = tmp_path / "half.safetensors"
    export_merged(path, tmp_path / "base.safetensors", half, gates=MIX, dtype=torch.bfloat16, any_base=True)
    assert {parameter.dtype for parameter in load_dit(half).parameters()} == {torch.bfloat16}
    with safe_open(tmp_path / "merged.safetensors", "pt") as handle:
        said = handle.metadata()
    source = json.loads(said["wanmoe_source"])
    assert json.loads(said["gates"]) == MIX and said["noise_expert"] == "high"
    assert source["alpha_base"] == 0.5 and source["alpha_expert"] == 1.0
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("base", ["keep", "svd"])
def test_layers_of_an_image_encoder_are_left_out_where_there_is_none(frozen, base, tmp_path, caplog):
    plain = kohya_file(tmp_path / "plain.safetensors")
    key = "lora_unet_blocks_0_cross_attn_{}_img"
    more = {key.format("k") + f".lora_{k}.weight": torch.ones(DIM, DIM) for k in ("down", "up")}
    more[key.format("norm_k") + ".diff"] = torch.ones(DIM)
    fast = kohya_file(tmp_path / "fast.safetensors", **more)
    wanted = import_adapter(plain, copy.deepcopy(frozen), config=CONFIG, base=base).parameters()
    with caplog.at_level(logging.INFO, "wanmoe"):
        found = import_adapter(fast, frozen, config=CONFIG, base=base).parameters()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert [message for message in caplog.messages if "2 of its 42 layers are of an image" in message]


def kohya_file(path, blocks=range(4), ranks=(6,), **more):
    """A vanilla LoRA on all ten linears of every block, alpha half its rank."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for index, block in enumerate(blocks):
        for linear in [f"{a}_attn_{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn_0", "ffn_2"]:
            d_in, d_out = (FFN if linear == "ffn_2" else DIM), (FFN if linear == "ffn_0" else DIM)
            rank, name = ranks[index % len(ranks)], f"lora_unet_blocks_{block}_{linear}"
            tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(rank, d_in, generator=generator)
            tensors[f"{name}.lora_up.weight"] = 0.3 * torch.randn(d_out, rank, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors | more, path)
    return path


def test_a_vanilla_lora_kept_whole_is_the_merged_model(frozen, clip, tmp_path):
    path = kohya_file(tmp_path / "lora.safetensors", ranks=(6, 4))
    plain = without_adapter(frozen, clip)
    merged = copy.deepcopy(frozen)
    for name, delta in read_lora(path).deltas.items():
        down, up = delta.factors()
        merged.get_parameter(f"{name}.weight").data += 0.5 * up @ down
    adapter = import_adapter(path, frozen, config=CONFIG)
    assert len(adapter.modules) == 40 and frozen.first_adapted == 0
    close(ours(adapter, clip, MIX), without_adapter(merged, clip), plain)
    # alpha_base scales all of it.
    torch.testing.assert_close(ours(adapter, clip, alpha_base=0.0), plain, rtol=1e-5, atol=1e-5)
    assert sum(module.experts > 0 for module in adapter.modules.values()) == 17


def test_a_vanilla_lora_cut_to_our_ranks_is_the_nearest_and_says_so(frozen, tmp_path, caplog):
    path = kohya_file(tmp_path / "lora.safetensors")
    with caplog.at_level(logging.INFO, "wanmoe.moe_lora.interop"):
        adapter = import_adapter(path, frozen, config=CONFIG, base="svd")
    assert len(adapter.modules) == 17
    lost = inside = total = 0.0
    for name, delta in read_lora(path).deltas.items():
        down, up = (factor.double() for factor in delta.factors())
        change = 0.5 * up @ down
        total += change.square().sum().item()
        if name in adapter.modules:
            module = adapter.modules[name]
            values = torch.linalg.svdvals(change)
            rest = (change - product(module).double()).square().sum()
            torch.testing.assert_close(
                rest, values[len(module.base_down) :].square().sum(), rtol=1e-4, atol=1e-8
            )
            lost, inside = lost + rest.item(), inside + change.square().sum().item()
    overall = caplog.messages[-1]
    assert f"error {(lost / inside) ** 0.5:.3g} of |dW|" in overall
    assert f"{100 * (1 - inside / total):.1f} % of |dW|^2 is in linears" in overall
    assert sum("rank 6 to 3" in message for message in caplog.messages) == 4


def test_a_lora_smaller_than_our_ranks_is_exact(frozen, tmp_path):
    path = kohya_file(tmp_path / "lora.safetensors", blocks=(3,), ranks=(1,))
    adapter = import_adapter(path, frozen, config=CONFIG, base="svd")
    for name, delta in read_lora(path).deltas.items():
        if name in adapter.modules:
            down, up = delta.factors()
            torch.testing.assert_close(product(adapter.modules[name]), 0.5 * up @ down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", ["keep", "svd"])
@pytest.mark.parametrize("kind", ["lora", "fork"])
def test_a_conversion_needs_no_weights_of_the_model(frozen, kind, base, tmp_path):
    path = (kohya_file if kind == "lora" else lambda path: fork_file(path)[0])(tmp_path / "in.safetensors")
    with torch.device("meta"):
        empty = WanDiT(frozen.config)
    converted = import_adapter(path, empty, config=CONFIG, base=base, device="cpu")
    there = import_adapter(path, frozen, config=CONFIG, base=base)
    assert converted.parameters().keys() == there.parameters().keys()
    for name, value in there.parameters().items():
        assert torch.equal(converted.parameters()[name], value), name


def test_what_no_adapter_can_hold_is_to_be_merged(frozen, tmp_path):
    path = tmp_path / "lora.safetensors"
    kohya_file(path, **{"lora_unet_blocks_0_norm3.diff": torch.zeros(DIM)})
    with pytest.raises(
        WanmoeError, match=r"by full differences \(blocks.0.norm3\).*--lora .*lora.safetensors"
    ):
        import_adapter(path, frozen)
    pair = {"down": torch.ones(1, 24), "up": torch.ones(24, 1)}
    kohya_file(path, **{f"lora_unet_time_embedding_2.lora_{k}.weight": v for k, v in pair.items()})
    with pytest.raises(WanmoeError, match=r"changes time_embedding.2, where an adapter cannot sit; merge it"):
        import_adapter(path, frozen)
    assert not any(isinstance(module, LoRAMoELinear) for module in frozen.modules())
    assert len(import_adapter(path, frozen, config=CONFIG, base="svd").modules) == 17


def test_a_lora_for_another_model_is_refused(frozen, tmp_path):
    path = kohya_file(tmp_path / "lora.safetensors", blocks=(3, 4))
    for base in ("keep", "svd"):
        with pytest.raises(WanmoeError, match=r"changes blocks.4.cross_attn.k.* but this model has 4 blocks"):
            import_adapter(path, frozen, config=CONFIG, base=base)
    wide = {"down": torch.ones(6, 32), "up": torch.ones(DIM, 6)}
    kohya_file(path, **{f"lora_unet_blocks_0_ffn_2.lora_{k}.weight": v for k, v in wide.items()})
    with pytest.raises(WanmoeError, match=r"blocks.0.ffn.2: the file has 32 -> 24, this model 40 -> 24"):
        import_adapter(path, frozen, config=CONFIG)


def test_a_file_of_the_other_side_is_refused_unless_asked_for(saved, frozen, tmp_path):
    _, ours_path = saved
    lora = kohya_file(tmp_path / "lora_high_noise.safetensors")
    fork = fork_file(tmp_path / "moe_high.safetensors")[0]
    for path in (ours_path, lora, fork):
        with pytest.raises(WanmoeError, match=r"belongs to the high noise expert, this model is low"):
            import_adapter(path, copy.deepcopy(frozen), noise_expert="low", config=CONFIG)
        for asked in ({"noise_expert": "low", "any_base": True}, {"noise_expert": "high"}):
            assert import_adapter(path, copy.deepcopy(frozen), config=CONFIG, **asked).count() > 0


def fork_file(path, names=("hook", "grasper", "laser"), ffn_rank=2, base=True, q_rank=lambda block: 3):
    """A file of the seed fork on blocks 2 and 3, and its tensors by module."""
    generator = torch.Generator().manual_seed(5)
    tensors, ranks = {}, {}
    for block in (2, 3):
        for linear in [f"attn{i}.{p}" for i in (1, 2) for p in "qkvo"] + ["ffn.fc1"] * (block == 3):
            rank = {"q": q_rank(block), "1": ffn_rank}.get(linear[-1], 2)
            d_out, module = (FFN if "ffn" in linear else DIM), f"lora_moe_{len(ranks)}"
            ranks[f"blocks.{block}.{linear}"] = rank
            parts = ["base_lora_{}"] * base + [f"expert_lora_{{}}.{e}" for e in range(len(names))]
            for part in parts:
                down, up = part.format("down"), part.format("up")
                tensors[f"{module}.{down}.weight"] = 0.3 * torch.randn(rank, DIM, generator=generator)
                tensors[f"{module}.{up}.weight"] = 0.3 * torch.randn(d_out, rank, generator=generator)
            tensors[f"{module}.org_module.weight"] = torch.zeros(d_out, DIM)
            tensors[f"{module}.current_gates"] = torch.zeros(len(names))
    config = {
        **{"lora_dim": 4, "alpha": 1.5, "num_experts": len(names), "expert_names": list(names)},
        **{"target_block_indices": [2, 3], "module_ranks": ranks},
    }
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    return path, tensors, ranks


def fork_maths(module, tensors, x, row):
    """What the fork adds to a linear: base + sum_e g_e * gate * expert, each alpha / r * up(down(x))."""

    def term(part):
        down = tensors[f"{module}.{part.format('down')}.weight"]
        return 1.5 / len(down) * x @ down.T @ tensors[f"{module}.{part.format('up')}.weight"].T

    base = term("base_lora_{}") if f"{module}.base_lora_up.weight" in tensors else 0
    return base + sum(g * 0.7876 * term(f"expert_lora_{{}}.{e}") for e, g in enumerate(row))


@pytest.mark.parametrize(
    "odd",
    [{}, {"base": False}, {"ffn_rank": 5}, {"q_rank": lambda block: block}],
    ids=["plain", "no base", "ffn rank", "ranks differ between blocks"],
)
def test_a_fork_file_computes_the_forks_own_maths(frozen, odd, tmp_path):
    path, tensors, ranks = fork_file(tmp_path / "moe.safetensors", **odd)
    adapter = import_adapter(path, frozen, fold_timestep=True)
    assert FORK_TIMESTEP_GATE == 0.7876
    assert adapter.experts.names == ["hook", "grasper", "laser"] and adapter.config.alpha == 1.5
    assert adapter.experts.find("电凝钩") == {"hook": 1}
    row = torch.tensor([0.7, 0.0, 0.3])
    names = {"attn1": "self_attn", "attn2": "cross_attn", "fc1": "0"}
    assert len(adapter.modules) == len(ranks) == 17
    x = torch.randn(5, DIM)
    for index, hybrid in enumerate(ranks):
        name = ".".join(names.get(part, part) for part in hybrid.split("."))
        module = adapter.modules[name]
        # The bands are off: the fork knew none.
        given = adapter.gates(row[None], torch.tensor([0.1]), tokens=5)
        with torch.no_grad():
            found = module(x[None], given)[0] - F.linear(x, module.weight, module.bias)
        torch.testing.assert_close(
            found, fork_maths(f"lora_moe_{index}", tensors, x, row.tolist()), rtol=1e-4, atol=1e-5
        )


def test_without_folding_the_bands_take_the_place_of_the_forks_gate(frozen, tmp_path):
    path, tensors, _ = fork_file(tmp_path / "moe.safetensors")
    adapter = import_adapter(path, frozen)
    assert adapter.router_config == RouterConfig() and adapter.config.base_ranks == {}
    q = adapter.modules["blocks.2.self_attn.q"]
    assert torch.equal(q.expert_up[1], tensors["lora_moe_0.expert_lora_up.1.weight"])
    assert torch.equal(q.base_down, tensors["lora_moe_0.base_lora_down.weight"])


def test_a_fork_file_comes_back_from_our_own(frozen, clip, tmp_path):
    path, _, _ = fork_file(tmp_path / "moe_low.safetensors")
    bare = copy.deepcopy(frozen)
    adapter = import_adapter(path, frozen)
    file = save_adapter(adapter, tmp_path / "ours.safetensors", stage="b", step=0, noise_expert="low")
    again = import_adapter(file, bare, noise_expert="low")
    assert torch.equal(ours(again, clip, {"laser": 1.0}), ours(adapter, clip, {"laser": 1.0}))


def test_notes_of_a_fork_file_are_logged_and_a_wrong_model_is_refused(frozen, tmp_path, caplog):
    path, _, _ = fork_file(tmp_path / "moe.safetensors")
    with caplog.at_level(logging.INFO, "wanmoe.moe_lora.interop"):
        import_adapter(path, copy.deepcopy(frozen))
    assert any("left out" in message and "moe.safetensors" in message for message in caplog.messages)
    frozen.blocks = frozen.blocks[:3]
    with pytest.raises(WanmoeError, match=r"moe.safetensors: changes blocks.3.* this model has 3 blocks"):
        import_adapter(path, frozen)


def test_an_export_of_experts_with_names_of_the_users_own(frozen, clip, tmp_path):
    config = AdapterConfig(blocks=1, ffn_blocks=0, experts=(Expert(name="milk"), Expert(name="sugar")))
    bare = copy.deepcopy(frozen)
    adapter = randomised(attach(frozen, config, ONE_BAND))
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage="b", step=1)
    export_lora(path, tmp_path / "out.safetensors", gates={"sugar": 2.0})
    plain = without_adapter(bare, clip)
    again = import_adapter(tmp_path / "out.safetensors", bare, config=config)
    close(ours(again, clip), ours(adapter, clip, {"sugar": 2.0}), plain)


def test_gates_of_a_forward_are_those_of_the_export(saved, clip):
    """The helper of these tests gives what the router gives: one row per clip."""
    adapter, _ = saved
    given = gates(adapter, clip, MIX)
    assert isinstance(given, Gates) and given.experts.tolist() == 2 * [[0.25, 0.0, 0.75, 0.0]]
