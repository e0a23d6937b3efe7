"""LoRA files of other tools: every layout gives the same changes under the original names."""

import json

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from wanmoe.moe_lora import AdapterConfig, WanmoeError, attach, save_adapter
from wanmoe.moe_lora import lora_file as module_under_test
from wanmoe.moe_lora.lora_file import noise_expert_of_name, read_lora, write_lora
from wanmoe.moe_lora.wan.weights import to_diffusers, to_original

DIM, FFN = 24, 40
SIZES = {  # original name -> (out, in, rank, alpha)
    "blocks.0.self_attn.q": (DIM, DIM, 3, 6.0),
    "blocks.2.self_attn.o": (DIM, DIM, 2, 1.0),
    "blocks.3.cross_attn.v": (DIM, DIM, 5, 2.5),
    "blocks.3.ffn.0": (FFN, DIM, 2, 4.0),
    "blocks.10.ffn.2": (DIM, FFN, 1, 1.0),
}


def factors():
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
        for name, (d_out, d_in, rank, _) in SIZES.items()
    }


def truth():
    return {name: SIZES[name][3] / down.shape[0] * up @ down for name, (down, up) in factors().items()}


def changes(file):
    products = {}
    for name, delta in file.deltas.items():
        down, up = delta.factors()
        products[name] = delta.scale * up @ down
    return products


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, msg=lambda text, name=name: f"{name}: {text}")


def kohya(name):
    return "lora_unet_" + name.replace(".", "_")


def with_alpha(rename, down_key="lora_down.weight", up_key="lora_up.weight"):
    tensors = {}
    for name, (down, up) in factors().items():
        tensors[f"{rename(name)}.{down_key}"], tensors[f"{rename(name)}.{up_key}"] = down, up
        tensors[f"{rename(name)}.alpha"] = torch.tensor(SIZES[name][3])
    return tensors


def folded(rename, down_key="lora_A.weight", up_key="lora_B.weight"):
    """The scale in equal parts in both factors, as convert_lora.py of musubi-tuner does it."""
    tensors = {}
    for name, (down, up) in factors().items():
        root = (SIZES[name][3] / down.shape[0]) ** 0.5
        tensors[f"{rename(name)}.{down_key}"] = root * down
        tensors[f"{rename(name)}.{up_key}"] = root * up
    return tensors


LAYOUTS = {
    "kohya": ("kohya", with_alpha(kohya)),
    "comfyui with alpha": ("comfyui", with_alpha(lambda name: f"diffusion_model.{name}")),
    "comfyui A and B": (
        "comfyui",
        with_alpha(lambda name: f"diffusion_model.{name}", "lora_A.weight", "lora_B.weight"),
    ),
    "musubi other": ("comfyui", folded(lambda name: f"diffusion_model.{name}")),
    "long prefix": ("comfyui", folded(lambda name: f"model.diffusion_model.{name}")),
    "bare original": ("original", folded(str)),
    "bare with an adapter's name": (
        "original",
        folded(str, "lora_A.default.weight", "lora_B.default.weight"),
    ),
    "diffusers": ("diffusers", folded(lambda name: f"transformer.{to_diffusers(name)}")),
    "bare diffusers": ("diffusers", folded(to_diffusers)),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_layout_gives_the_same_changes(kind, suffix, tmp_path):
    layout, tensors = LAYOUTS[kind]
    path = tmp_path / f"lora{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    file = read_lora(path)
    assert file.format == layout
    assert_same(changes(file), truth())
    assert {name: delta.rank for name, delta in file.deltas.items()} == {n: s[2] for n, s in SIZES.items()}


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_a_missing_or_zero_alpha_is_the_rank(alpha, tmp_path):
    tensors = {key: value for key, value in with_alpha(kohya).items() if not key.endswith(".alpha")}
    if alpha is not None:
        tensors |= {f"{kohya(name)}.alpha": torch.tensor(alpha) for name in SIZES}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert {delta.scale for delta in read_lora(tmp_path / "lora.safetensors").deltas.values()} == {1.0}


def transformer():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=12, freq_dim=16, ffn_dim=FFN, num_layers=3,
    )  # fmt: skip


def randomised(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def peft_truth(model):
    """What PEFT itself adds to each weight, by original name."""
    return {
        to_original(name.removeprefix("base_model.model.")): layer.get_delta_weight(layer.active_adapter[0])
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


CONFIG = dict(
    r=3,
    lora_alpha=6,
    rank_pattern={"to_q": 5, "blocks.1.ffn.net.2": 2},
    alpha_pattern={"attn2.to_q": 7.5, r"blocks\.[01]\.attn1\.to_out\.0": 1.0},
    target_modules=["to_q", "to_k", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_what_it_computes(rslora, tmp_path):
    model = randomised(get_peft_model(transformer(), LoraConfig(use_rslora=rslora, **CONFIG)))
    model.save_pretrained(tmp_path / "lora_low")
    expected = peft_truth(model)
    assert len(expected) == 3 * 8
    for path in (tmp_path / "lora_low", tmp_path / "lora_low" / "adapter_model.safetensors"):
        file = read_lora(path)
        assert (file.format, file.noise_expert) == ("peft", "low")
        assert_same(changes(file), expected)


@pytest.mark.parametrize("of", ["model", "pipeline"])
def test_what_diffusers_saves_with_its_metadata_is_what_it_computes(of, tmp_path):
    model = transformer()
    model.add_adapter(LoraConfig(**CONFIG), adapter_name="hook")
    randomised(model)
    if of == "model":
        model.save_lora_adapter(tmp_path, adapter_name="hook")
    else:
        layers = get_peft_model_state_dict(model, adapter_name="hook")
        metadata = json.loads(json.dumps(model.peft_config["hook"].to_dict(), default=list))
        WanPipeline.save_lora_weights(
            tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )
    file = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert file.format == "diffusers"
    assert_same(changes(file), peft_truth(model))


def test_differences_norms_convolutions_and_modulation_have_their_places(tmp_path):
    tensors = {
        "diffusion_model.blocks.1.norm3.diff": torch.randn(DIM),
        "diffusion_model.blocks.1.norm3.diff_b": torch.randn(DIM),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": torch.randn(DIM),
        "diffusion_model.blocks.1.diff_m": torch.randn(1, 6, DIM),
        "diffusion_model.head.modulation.diff": torch.randn(1, 2, DIM),
        "diffusion_model.head.head.diff_b": torch.randn(64),
        "diffusion_model.patch_embedding.lora_down.weight": torch.randn(2, 16, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_up.weight": torch.randn(DIM, 2, 1, 1, 1),
        "diffusion_model.time_projection.1.lora_down.weight": torch.randn(2, DIM),
        "diffusion_model.time_projection.1.lora_up.weight": torch.randn(6 * DIM, 2),
        "diffusion_model.time_projection.1.diff_b": torch.randn(6 * DIM),
        "diffusion_model.img_emb.proj.1.diff": torch.randn(4, 4),
        "diffusion_model.blocks.1.cross_attn.k_img.diff": torch.randn(DIM, DIM),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    deltas = read_lora(tmp_path / "lora.safetensors").deltas
    assert set(deltas) == {
        *("blocks.1.norm3", "blocks.1.self_attn.norm_q", "blocks.1.modulation", "head.modulation"),
        *("head.head", "patch_embedding", "time_projection.1", "img_emb.proj.1", "blocks.1.cross_attn.k_img"),
    }
    assert torch.equal(deltas["blocks.1.modulation"].diff.read(), tensors["diffusion_model.blocks.1.diff_m"])
    assert torch.equal(
        deltas["blocks.1.norm3"].diff_b.read(), tensors["diffusion_model.blocks.1.norm3.diff_b"]
    )
    assert deltas["blocks.1.norm3"].rank == 0
    down, up = deltas["patch_embedding"].factors()
    assert (down.shape, up.shape) == ((2, 64), (DIM, 2)) and deltas["patch_embedding"].down.shape == (2, 64)
    with pytest.raises(ValueError, match="has no factors"):
        deltas["head.head"].factors()
    both = deltas["time_projection.1"]
    assert both.rank == 2 and both.diff_b is not None and both.diff is None


def test_factors_stay_in_the_file_until_they_are_asked_for(tmp_path, monkeypatch):
    save_file(with_alpha(kohya), tmp_path / "lora.safetensors")
    reads = []

    def counting(path):
        weights = open_weights(path)
        return weights._replace(
            tensors={
                name: stored._replace(read=lambda name=name, read=stored.read: reads.append(name) or read())
                for name, stored in weights.tensors.items()
            }
        )

    open_weights = module_under_test.open_weights
    monkeypatch.setattr(module_under_test, "open_weights", counting)
    file = read_lora(tmp_path / "lora.safetensors")
    assert {name.rpartition(".")[2] for name in reads} == {"alpha"}
    changes(file)
    assert len(reads) == 3 * len(SIZES)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_te_text_model.lora_down.weight": torch.zeros(2, 2)}, r"1 of 1 tensors are none of a LoRA"),
        ({"lora_unet_blocks_0_attn_q.lora_down.weight": torch.zeros(2, 2)}, "none of a LoRA on Wan: lora_"),
        ({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, r"none of a LoRA on Wan: blocks.0.self_"),
        ({"diffusion_model.blocks.0.self_attn.q.hada_w1_a": torch.zeros(2, 2)}, "holds LoHa, which are not"),
        ({"lora_unet_blocks_0_ffn_0.lokr_w1": torch.zeros(2, 2)}, "holds LoKr"),
        (
            {
                **with_alpha(kohya),
                **{f"{kohya(n)}.dora_scale": torch.ones(1) for n in SIZES},
            },
            "holds DoRA, .*lora_unet_blocks_0_self_attn_q.dora_scale",
        ),
        (
            {k: v for k, v in with_alpha(kohya).items() if "ffn_0.lora_up" not in k},
            r"blocks\.3\.ffn\.0 has a down \(A\) factor but no up \(B\)",
        ),
        ({"lora_unet_blocks_0_ffn_0.alpha": torch.tensor(1.0)}, "blocks.0.ffn.0 has an alpha and no factors"),
        (
            {
                "diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 4),
                "diffusion_model.blocks.0.ffn.0.lora_B.weight": torch.zeros(4, 3),
            },
            r"blocks.0.ffn.0: down \(2, 4\) and up \(4, 3\) are no pair",
        ),
        (
            {**with_alpha(kohya), **folded(lambda name: f"diffusion_model.{name}")},
            "blocks.0.self_attn.q has two tensors that are its",
        ),
        (
            {
                "lora_unet_blocks_0_ffn_0.diff": torch.zeros(2),
                "diffusion_model.blocks.1.ffn.0.diff": torch.zeros(2),
            },
            "mixes the names of comfyui and kohya",
        ),
        ({"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.zeros(2, 4),
          "lora_unet_blocks_0_ffn_0.lora_up.weight": torch.zeros(4, 2),
          "lora_unet_blocks_0_ffn_0.alpha": torch.tensor(float("nan"))}, "alpha / rank = nan"),
        ({"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.zeros(0, 4),
          "lora_unet_blocks_0_ffn_0.lora_up.weight": torch.zeros(4, 0),
          "lora_unet_blocks_0_ffn_0.alpha": torch.tensor(1.0)}, "blocks.0.ffn.0 has rank 0"),
        (
            {**folded(lambda name: f"transformer.{to_diffusers(name)}"),
             **folded(lambda name: f"transformer_2.{to_diffusers(name)}")},
            "a LoRA of each model of a pipeline",
        ),
        (
            {"base_model.model.blocks.0.ffn.net.2.lora_A.weight": torch.zeros(2, 4),
             "base_model.model.blocks.0.ffn.net.2.lora_B.weight": torch.zeros(4, 2)},
            "a PEFT LoRA needs adapter_config.json beside it",
        ),
    ],
)  # fmt: skip
def test_what_is_no_lora_on_wan_is_one_clear_line(tensors, words, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(WanmoeError, match=words) as caught:
        read_lora(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", r"adapter_config.json: is not JSON"),
        ("[]", "expected a JSON object, found a list"),
        ('{"r": 2}', "lora_alpha is missing"),
        ('{"lora_alpha": "4"}', "lora_alpha '4'.* must hold numbers"),
        ('{"lora_alpha": 4, "alpha_pattern": ["to_q"]}', r"alpha_pattern \['to_q'\] must hold numbers"),
        (
            '{"lora_alpha": 4, "alpha_pattern": {"(to_q": 2}}',
            r"alpha_pattern '\(to_q' is no regular expression",
        ),
        ('{"lora_alpha": 4, "use_dora": true}', "DoRA is not supported"),
    ],
)
def test_a_damaged_peft_config_is_named(config, words, tmp_path):
    write_lora(tmp_path / "lora", factors(), format="peft")
    (tmp_path / "lora" / "adapter_config.json").write_text(config)
    with pytest.raises(WanmoeError, match=words):
        read_lora(tmp_path / "lora")


def test_garbage_and_our_own_adapter_are_refused(dit, tmp_path):
    (tmp_path / "garbage.safetensors").write_bytes(b"no header here")
    with pytest.raises(WanmoeError, match="garbage.safetensors: not a whole safetensors file"):
        read_lora(tmp_path / "garbage.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(WanmoeError, match="is empty"):
        read_lora(tmp_path / "empty.safetensors")
    path = save_adapter(
        attach(dit, AdapterConfig(blocks=1)), tmp_path / "ours.safetensors", stage="a", step=1
    )
    with pytest.raises(WanmoeError, match=r"ours.safetensors: is an adapter of wanmoe, not a LoRA"):
        read_lora(path)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("wan2.2_t2v_high_noise_lora_rank64.safetensors", "high"),
        ("Wan22-I2V-LowNoise.safetensors", "low"),
        ("hook_high.safetensors", "high"),
        ("hook-low.safetensors", "low"),
        ("hook_high/adapter_model.safetensors", "high"),
        ("hook_low", "low"),
        ("high_quality.safetensors", None),
        ("highway_slow.safetensors", None),
        ("high_noise_and_low_noise.safetensors", None),
    ],
)
def test_the_side_is_in_the_name(name, side):
    assert noise_expert_of_name(name) == side


def test_metadata_decide_the_side_before_the_name(tmp_path):
    path = tmp_path / "lora_high.safetensors"
    write_lora(path, factors(), metadata={"noise_expert": "low"})
    assert read_lora(path).noise_expert == "low"


def test_a_stated_side_is_normalised_or_refused_and_gives_way_to_what_is_asked_for(tmp_path):
    path = tmp_path / "lora.safetensors"
    write_lora(path, factors(), metadata={"noise_expert": " High "})
    assert read_lora(path).noise_expert == "high" and read_lora(path, "low").noise_expert == "low"
    write_lora(path, factors(), metadata={"noise_expert": "upper"})
    with pytest.raises(WanmoeError, match=r"lora.safetensors: .* noise expert 'upper', .* high, low, both"):
        read_lora(path)
    assert read_lora(path, "low").noise_expert == "low"


def test_the_second_transformer_of_a_pipeline_is_the_low_noise_model(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(folded(lambda name: f"transformer_2.{to_diffusers(name)}"), path)
    file = read_lora(path)
    assert (file.format, file.noise_expert) == ("diffusers", "low")
    assert_same(changes(file), truth())
    stated = {"transformer_2.lora_alpha": 6, "transformer_2.r": 3}
    metadata = {"lora_adapter_metadata": json.dumps(stated)}
    save_file(folded(lambda name: f"transformer_2.{to_diffusers(name)}"), path, metadata=metadata)
    assert read_lora(path).deltas["blocks.0.self_attn.q"].scale == 2.0


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "peft"])
def test_what_is_written_has_one_rank_and_reads_back(layout, tmp_path):
    path = tmp_path / ("lora" if layout == "peft" else "lora.safetensors")
    assert write_lora(path, factors(), format=layout, metadata={"note": "mix"}) == 5
    file = read_lora(path)
    assert file.format == layout and file.metadata["note"] == "mix"
    assert {delta.rank for delta in file.deltas.values()} == {5}
    assert_same(changes(file), {name: up @ down for name, (down, up) in factors().items()})
    weights = path / "adapter_model.safetensors" if layout == "peft" else path
    with safe_open(weights, "pt") as handle:
        assert handle.metadata()["format"] == "pt"
        assert not any("alpha" in key for key in handle.keys())  # noqa: SIM118


def test_peft_itself_reads_what_is_written(tmp_path):
    in_model = {name: pair for name, pair in factors().items() if int(name.split(".")[1]) < 3}
    write_lora(tmp_path / "lora", in_model, format="peft")
    model = PeftModel.from_pretrained(transformer(), tmp_path / "lora")
    assert_same(peft_truth(model), {name: up @ down for name, (down, up) in in_model.items()})


def test_a_target_of_the_wrong_kind_is_refused(tmp_path):
    with pytest.raises(
        WanmoeError, match=r"a comfyui LoRA is one file, give a name that ends in .safetensors"
    ):
        write_lora(tmp_path / "lora", factors())
    with pytest.raises(WanmoeError, match="a PEFT LoRA is a folder"):
        write_lora(tmp_path / "lora.safetensors", factors(), format="peft")
    with pytest.raises(WanmoeError, match=r"a PEFT LoRA is a folder, .* without .mp4"):
        write_lora(tmp_path / "lora.mp4", factors(), format="peft")
    assert write_lora(tmp_path / "mix-0.5", factors(), format="peft") == 5
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(WanmoeError, match="a PEFT LoRA is a folder"):
        write_lora(tmp_path / "taken", factors(), format="peft")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(WanmoeError, match="could not be written"):
        write_lora(tmp_path / "folder.safetensors", factors())
