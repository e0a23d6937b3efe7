"""LoRAs merged into the weights at load: W + strength * alpha / r * up @ down, once, in float32."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanmoe.moe_lora import WanmoeError
from wanmoe.moe_lora.lora_merge import LoRAMerge, LoRASpec
from wanmoe.moe_lora.wan.weights import load_dit, save_dit

DIM, FFN = 24, 40


@pytest.fixture
def base(dit, tmp_path):
    path = tmp_path / "base.safetensors"
    save_dit(dit, path)
    return path


def write(path, tensors, metadata=None):
    generator = torch.Generator().manual_seed(len(tensors))
    filled = {
        key: shape if isinstance(shape, torch.Tensor) else torch.randn(shape, generator=generator)
        for key, shape in tensors.items()
    }
    save_file(filled, path, metadata=metadata)
    return filled


KOHYA = {
    "lora_unet_blocks_0_self_attn_q.lora_down.weight": (3, DIM),
    "lora_unet_blocks_0_self_attn_q.lora_up.weight": (DIM, 3),
    "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(1.5),
    "lora_unet_blocks_3_ffn_2.lora_down.weight": (2, FFN),
    "lora_unet_blocks_3_ffn_2.lora_up.weight": (DIM, 2),
}
COMFY = {
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": (2, DIM),
    "diffusion_model.blocks.0.self_attn.q.lora_B.weight": (DIM, 2),
    "diffusion_model.blocks.0.self_attn.q.diff_b": (DIM,),
    "diffusion_model.blocks.1.norm3.diff": (DIM,),
    "diffusion_model.blocks.1.norm3.diff_b": (DIM,),
    "diffusion_model.blocks.2.diff_m": (1, 6, DIM),
    "diffusion_model.head.head.diff": (64, DIM),
    "diffusion_model.patch_embedding.lora_down.weight": (2, 16, 1, 2, 2),
    "diffusion_model.patch_embedding.lora_up.weight": (DIM, 2, 1, 1, 1),
}


def expected_changes(tensors, prefix="diffusion_model."):
    """By parameter, from the definition."""
    t = {key.removeprefix(prefix): value.double() for key, value in tensors.items()}
    q, patch = "blocks.0.self_attn.q", "patch_embedding"
    kernel = t[f"{patch}.lora_up.weight"].flatten(1) @ t[f"{patch}.lora_down.weight"].flatten(1)
    return {
        f"{q}.weight": t[f"{q}.lora_B.weight"] @ t[f"{q}.lora_A.weight"],
        f"{q}.bias": t[f"{q}.diff_b"],
        "blocks.1.norm3.weight": t["blocks.1.norm3.diff"],
        "blocks.1.norm3.bias": t["blocks.1.norm3.diff_b"],
        "blocks.2.modulation": t["blocks.2.diff_m"],
        "head.head.weight": t["head.head.diff"],
        "patch_embedding.weight": kernel.view(DIM, 16, 1, 2, 2),
    }


def test_a_musubi_file_adds_alpha_over_rank_times_up_down(dit, base, tmp_path):
    lora = write(tmp_path / "lora.safetensors", KOHYA)
    merged = load_dit(base, loras=[LoRASpec(tmp_path / "lora.safetensors", 0.8)]).state_dict()
    change = {
        "blocks.0.self_attn.q.weight": 0.8
        * (1.5 / 3)
        * lora["lora_unet_blocks_0_self_attn_q.lora_up.weight"].double()
        @ lora["lora_unet_blocks_0_self_attn_q.lora_down.weight"].double(),
        "blocks.3.ffn.2.weight": 0.8
        * lora["lora_unet_blocks_3_ffn_2.lora_up.weight"].double()
        @ lora["lora_unet_blocks_3_ffn_2.lora_down.weight"].double(),
    }
    for name, value in dit.state_dict().items():
        if name in change:
            torch.testing.assert_close(merged[name], (value + change[name]).float(), rtol=1e-5, atol=1e-6)
            assert (merged[name] - value).abs().max() > 0.1
        else:
            assert torch.equal(merged[name], value), name


def test_two_files_with_every_kind_of_change_add_up(dit, base, tmp_path):
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    first, second = (
        write(paths[0], COMFY),
        write(paths[1], {**COMFY, "diffusion_model.head.head.diff_b": (64,)}),
    )
    merged = load_dit(base, loras=[LoRASpec(paths[0]), LoRASpec(paths[1], -0.5)]).state_dict()
    one, two = expected_changes(first), expected_changes(second)
    two["head.head.bias"] = second["diffusion_model.head.head.diff_b"].double()
    for name, value in dit.state_dict().items():
        wanted = value.double() + one.get(name, 0) - 0.5 * two.get(name, 0)
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_low_precision_weight_is_rounded_once(dit, tmp_path):
    write(tmp_path / "lora.safetensors", KOHYA)
    specs = [LoRASpec(tmp_path / "lora.safetensors", 0.01)]
    wide = load_dit(dit.state_dict(), dit.config, loras=specs).state_dict()
    to_bf16 = load_dit(dit.state_dict(), dit.config, dtype=torch.bfloat16, loras=specs).state_dict()
    for name, value in wide.items():
        assert torch.equal(to_bf16[name], value.bfloat16()), name
    narrow = {name: value.bfloat16() for name, value in dit.state_dict().items()}
    stored = load_dit(narrow, dit.config, loras=specs).state_dict()
    widened = {name: value.float() for name, value in narrow.items()}
    for name, value in load_dit(widened, dit.config, loras=specs).state_dict().items():
        assert stored[name].dtype == torch.bfloat16 and torch.equal(stored[name], value.bfloat16()), name


def test_the_source_is_left_as_it_is_and_without_loras_nothing_changes(dit, tmp_path):
    write(tmp_path / "lora.safetensors", KOHYA)
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    load_dit(dit.state_dict(), dit.config, loras=[LoRASpec(tmp_path / "lora.safetensors")])
    for name, value in load_dit(dit.state_dict(), dit.config).state_dict().items():
        assert torch.equal(value, before[name]) and torch.equal(dit.state_dict()[name], before[name])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {
                **KOHYA,
                "lora_unet_blocks_9_ffn_0.diff": (FFN, DIM),
                "lora_unet_blocks_8_ffn_0.diff": (FFN, DIM),
            },
            "2 of the 4 parameters that it changes are not in this model: "
            "blocks.8.ffn.0.weight, blocks.9.ffn.0.weight; is it a LoRA for another Wan?",
        ),
        ({"diffusion_model.blocks.1.self_attn.norm_q.diff_b": (DIM,)}, "blocks.1.self_attn.norm_q.bias"),
        (
            {
                "lora_unet_blocks_0_ffn_0.lora_down.weight": (2, 32),
                "lora_unet_blocks_0_ffn_0.lora_up.weight": (FFN, 2),
            },
            r"its change of blocks.0.ffn.0.weight is \(40, 32\), this model's parameter is \(40, 24\)",
        ),
        ({"lora_unet_blocks_0_ffn_0.diff_b": (FFN + 1,)}, r"blocks.0.ffn.0.bias is \(41,\), this model's"),
    ],
)
def test_a_lora_that_does_not_fit_is_named_before_any_weight_is_read(dit, tensors, words, tmp_path):
    write(tmp_path / "lora.safetensors", tensors)

    class Untouched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert "detach" not in str(function), "a weight was read"
            return super().__torch_function__(function, types, args, kwargs or {})

    state = {name: value.as_subclass(Untouched) for name, value in dit.state_dict().items()}
    with pytest.raises(WanmoeError, match=words) as caught:
        load_dit(state, dit.config, loras=[LoRASpec(tmp_path / "lora.safetensors")])
    assert str(tmp_path / "lora.safetensors") in str(caught.value)


def test_apply_refuses_a_parameter_of_another_shape(tmp_path):
    write(tmp_path / "lora.safetensors", KOHYA)
    merge = LoRAMerge([LoRASpec(tmp_path / "lora.safetensors")])
    with pytest.raises(WanmoeError, match=r"is \(24, 24\), this model's parameter is \(24, 25\)"):
        merge.apply("blocks.0.self_attn.q.weight", torch.zeros(24, 25))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.safetensors", LoRASpec(Path("a.safetensors"))),
        ("a.safetensors:0.7", LoRASpec(Path("a.safetensors"), 0.7)),
        ("dir/a.safetensors:-1:low", LoRASpec(Path("dir/a.safetensors"), -1.0, "low")),
        ("a.safetensors:high", LoRASpec(Path("a.safetensors"), 1.0, "high")),
        ("a.safetensors:high:0.5", LoRASpec(Path("a.safetensors"), 0.5, "high")),
        ("a.safetensors:0.5:HIGH", LoRASpec(Path("a.safetensors"), 0.5, "high")),
    ],
)
def test_a_lora_is_written_as_file_strength_side(text, spec):
    assert LoRASpec.parse(text) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.safetensors:strong", "'strong' is neither a strength nor high or low, and there is no file"),
        ("a.safetensors:high:low", "'high' is neither a strength"),
        ("a.safetensors:1:2", "'1' is neither a strength"),
        ("a.safetensors:inf", "the strength inf is not finite"),
        (":0.5", r"no file is named; write file\[:strength\]"),
        ("", "no file is named"),
    ],
)
def test_what_is_written_otherwise_is_refused(text, words):
    with pytest.raises(WanmoeError, match=words):
        LoRASpec.parse(text)


def test_a_file_may_have_a_colon_in_its_name(tmp_path):
    path = tmp_path / "odd:name.safetensors"
    write(path, KOHYA)
    assert LoRASpec.parse(f"{path}:0.5") == LoRASpec(path, 0.5)
    assert LoRASpec.parse(str(path)) == LoRASpec(path)


def test_a_lora_goes_to_the_side_that_it_names(tmp_path):
    for name, metadata in (
        ("plain", None),
        ("fast_high_noise", None),
        ("tool", {"noise_expert": "low"}),
        ("all", {"noise_expert": "both"}),
    ):
        write(tmp_path / f"{name}.safetensors", KOHYA, metadata)

    def serves(name, side=None):
        spec = LoRASpec(tmp_path / f"{name}.safetensors", 0.5, side)
        return spec.serves("high"), spec.serves("low")

    assert serves("plain") == serves("all") == (True, True)
    assert serves("plain", "low") == serves("all", "low") == serves("tool") == (False, True)
    assert serves("fast_high_noise") == serves("fast_high_noise", "high") == (True, False)


def test_a_side_that_is_asked_for_wins_over_the_file_and_is_said_once(dit, tmp_path, caplog):
    path = tmp_path / "tool_low.safetensors"
    write(path, KOHYA, {"noise_expert": "Low"})
    spec = LoRASpec(path, side="high")
    with caplog.at_level(logging.INFO, "wanmoe"):
        assert (spec.serves("high"), spec.serves("low")) == (True, False)
        merged = load_dit(dit.state_dict(), dit.config, loras=[spec]).state_dict()
    changed = [name for name, value in dit.state_dict().items() if not torch.equal(merged[name], value)]
    assert changed == ["blocks.0.self_attn.q.weight", "blocks.3.ffn.2.weight"]
    (said,) = [message for message in caplog.messages if "tool_low" in message]
    assert "'Low'; it is taken for the high noise expert" in said
    write(path, KOHYA, {"noise_expert": "upper"})
    with pytest.raises(WanmoeError, match=r"tool_low.*noise expert 'upper', .*--lora FILE:high"):
        LoRASpec(path).serves("high")
    assert spec.serves("high")


def test_changes_of_an_image_encoder_are_left_out_where_there_is_none(dit, tmp_path, caplog):
    plain, more = tmp_path / "plain.safetensors", tmp_path / "fast.safetensors"
    first = write(plain, KOHYA)
    extra = {
        "lora_unet_blocks_0_cross_attn_k_img.lora_down.weight": torch.ones(2, DIM),
        "lora_unet_blocks_0_cross_attn_k_img.lora_up.weight": torch.ones(DIM, 2),
        "lora_unet_blocks_0_cross_attn_norm_k_img.diff": torch.ones(DIM),
        "lora_unet_img_emb_proj_1.diff_b": torch.ones(DIM),
    }
    save_file(first | extra, more)
    wanted = load_dit(dit.state_dict(), dit.config, loras=[LoRASpec(plain)]).state_dict()
    with caplog.at_level(logging.INFO, "wanmoe"):
        found = load_dit(dit.state_dict(), dit.config, loras=[LoRASpec(more)]).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert [m for m in caplog.messages if "3 of its 5 changes are of an image encoder" in m]


@pytest.mark.parametrize("key", ["lora_unet_blocks_3_ffn_2.lora_up.weight", "lora_unet_blocks_3_ffn_2.diff"])
def test_values_that_are_not_finite_are_not_merged(dit, tmp_path, key):
    bad = torch.ones(DIM, 2 if "up" in key else FFN)
    bad[0, 0] = float("nan")
    write(tmp_path / "lora.safetensors", {**KOHYA, key: bad})
    with pytest.raises(WanmoeError, match=r"lora.*blocks.3.ffn.2.weight: holds values that are not finite"):
        load_dit(dit.state_dict(), dit.config, loras=[LoRASpec(tmp_path / "lora.safetensors")])
