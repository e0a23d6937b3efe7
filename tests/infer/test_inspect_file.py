"""Every format by its own writer or documented layout: what inspect names, and what it says of garbage."""

import hashlib
import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wanmoe.infer import inspect_file as module
from wanmoe.infer.inspect_file import inspect_file
from wanmoe.moe_lora import AdapterConfig, RouterConfig, WanConfig, WanDiT, WanmoeError, attach, save_adapter
from wanmoe.moe_lora.instruments import CHOLEC
from wanmoe.moe_lora.lora_file import write_lora
from wanmoe.moe_lora.wan.weights import save_dit, to_diffusers

CONFIG = WanConfig(dim=128, ffn_dim=40, num_heads=1, num_layers=3, text_dim=12, text_len=8, freq_dim=16)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return WanDiT(CONFIG).requires_grad_(False)


def reported(path, **expected):
    """The report; what is expected of it must stand in its fields, and in the lines for the terminal."""
    report = inspect_file(path)
    for name, value in expected.items():
        assert getattr(report, name) == value, name
    assert json.loads(json.dumps(report.to_json()))["format"] == report.format
    lines = report.lines()
    assert all("\n" not in line for line in lines)
    assert report.format in lines[1] and (
        report.sha256 is None or any(report.sha256 in line for line in lines)
    )
    return report


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_our_adapter_with_its_untrained_experts(dit, tmp_path):
    config = AdapterConfig(experts=CHOLEC, blocks=2, ffn_blocks=1, rank_q=3, rank_ffn=1, alpha=2.0)
    model = WanDiT(CONFIG)
    adapter = attach(model, config, RouterConfig(mode="learned"))
    for linear in adapter.modules.values():
        torch.nn.init.normal_(linear.expert_up.data[3])
    # One linear is enough for an expert to count as trained.
    torch.nn.init.normal_(adapter.modules["blocks.1.cross_attn.k"].expert_up.data[0])
    path = save_adapter(
        adapter, tmp_path / "a.safetensors", stage="b", step=7, noise_expert="low", base_sha256="ab"
    )
    report = reported(
        path,
        format="adapter of wanmoe (wanmoe-adapter/1)",
        task="t2v",
        noise_expert="low",
        linears="17 in blocks 1-2",
        ranks={part: {"q": [3], "k": [4], "v": [4], "o": [4], "ffn.0": [1]} for part in ("base", "experts")},
        parameters=adapter.count(),
        dtypes={"float32": adapter.count()},
        sha256=sha256(path),
    )
    assert {e.name for e in report.experts if e.trained} == {"grasper", "scissors"}
    assert [e.name for e in report.experts] == [e.name for e in CHOLEC]
    assert report.details["stage"] == "b" and report.details["step"] == 7
    assert report.notes == ["the base adapter is all zero: it was never trained"]
    assert report.details["router"] == "learned" and report.details["base_sha256"] == "ab"
    text = " ".join(" ".join(report.lines()).split())
    assert "rank of experts q 3, k 4, v 4, o 4, ffn.0 1 " in text
    assert "grasper, bipolar (all zero: never trained), hook (all zero: never trained), scissors," in text


def test_a_base_that_covers_more_than_the_experts(tmp_path):
    config = AdapterConfig(
        blocks=1, ffn_blocks=0, base_ranks={"blocks.0.ffn.2": 5, "blocks.2.self_attn.q": 6}
    )
    adapter = attach(WanDiT(CONFIG), config)
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage="a", step=0)
    report = reported(path, linears="9 in blocks 0, 2", parameters=adapter.count())
    assert list(report.ranks["base"]) == ["q", "k", "v", "o", "ffn.2"]
    assert report.ranks["base"] == {"q": [6, 8], "k": [4], "v": [4], "o": [4], "ffn.2": [5]}
    assert report.ranks["experts"] == {"q": [8], "k": [4], "v": [4], "o": [4]}


@pytest.fixture(params=["safetensors", "pt"])
def fork_file(request, tmp_path):
    ranks = {f"blocks.2.{attn}.{letter}": 2 for attn in ("attn1", "attn2") for letter in "qkvo"}
    config = {"alpha": 1.0, "num_experts": 2, "expert_names": ["Hook", "Suction"], "module_ranks": ranks}
    nested = {}
    for index in range(len(ranks)):
        nested[f"lora_moe_{index}"] = {
            "base_lora_down.weight": torch.ones(2, 6),
            "base_lora_up.weight": torch.ones(6, 2),
            **{f"expert_lora_down.{expert}.weight": torch.ones(2, 6) for expert in range(2)},
            **{f"expert_lora_up.{expert}.weight": torch.full((6, 2), 1.0 - expert) for expert in range(2)},
            "org_module.weight": torch.ones(6, 6),
        }
    path = tmp_path / f"moe_high.{request.param}"
    if request.param == "pt":
        torch.save({**nested, "config": config}, path)
        return path
    flat = {f"{part}.{name}": t for part, state in nested.items() for name, t in state.items()}
    save_file(flat, path, metadata={"config": json.dumps(config)})
    return path


def test_a_file_of_the_fork(fork_file):
    report = reported(
        fork_file,
        format="LoRA-MoE of the musubi-tuner fork",
        noise_expert="high",
        linears="8 in blocks 2",
        parameters=8 * 3 * 24,
        dtypes={"float32": 8 * 3 * 24},
        sha256=sha256(fork_file),
    )
    assert report.ranks["base"] == report.ranks["experts"] == {"q": [2], "k": [2], "v": [2], "o": [2]}
    assert [(expert.name, expert.trained) for expert in report.experts] == [
        ("Hook", True),
        ("Suction", False),
    ]
    assert any("copies of frozen weights: 8 tensors, 288 values" in note for note in report.notes)


def test_a_file_of_the_fork_without_its_config_shows_what_its_tensors_do(fork_file, tmp_path):
    named = inspect_file(fork_file)
    bare, config = tmp_path / "bare_low.safetensors", tmp_path / "fork.json"
    if fork_file.suffix == ".pt":
        content = torch.load(fork_file, weights_only=True)
        config.write_text(json.dumps(content.pop("config")))
        torch.save(content, bare := tmp_path / "bare_low.pt")
    else:
        with safe_open(fork_file, "pt") as handle:
            config.write_text(handle.metadata()["config"])
        save_file(load_file(fork_file), bare)
    report = reported(
        bare,
        format="LoRA-MoE of the musubi-tuner fork",
        noise_expert="low",
        linears="8, not named",
        ranks={"base": {"lora_moe": [2]}, "experts": {"lora_moe": [2]}},
        parameters=8 * 3 * 24,
    )
    assert [(e.name, e.trained) for e in report.experts] == [("expert 0", True), ("expert 1", False)]
    assert report.notes[-1].startswith("names of linears and experts need --lora_moe_config_file: nothing")
    told = inspect_file(bare, config_file=config)
    assert (told.experts, told.ranks, told.linears) == (named.experts, named.ranks, named.linears)
    config.write_text("[]")
    with pytest.raises(WanmoeError, match="fork.json: expected keys and values"):
        inspect_file(bare, config_file=config)


def test_a_config_of_the_fork_is_for_its_files_alone(dit, tmp_path):
    save_dit(dit, path := tmp_path / "dit.safetensors")
    with pytest.raises(WanmoeError, match="dit.safetensors: is no LoRA-MoE file of the fork"):
        inspect_file(path, config_file=tmp_path / "x.json")


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "peft"])
def test_loras_as_we_write_them(tmp_path, layout):
    factors = {
        "blocks.0.self_attn.q": (torch.ones(3, 10), torch.ones(10, 3)),
        "blocks.1.ffn.0": (torch.ones(2, 10), torch.ones(12, 2)),
        "head.head": (torch.ones(1, 10), torch.ones(4, 1)),
    }
    path = tmp_path / ("moe_low" if layout == "peft" else "moe_low.safetensors")
    metadata = {
        "noise_expert": "low",
        "gates": json.dumps({"钩": 0.6}),
        "wanmoe_source": json.dumps({"task": "i2v", "step": 3}),
    }
    write_lora(path, factors, format=layout, metadata=metadata)
    report = reported(
        path,
        task="i2v",
        noise_expert="low",
        linears="2 in blocks 0-1, 1 outside the blocks",
        ranks={"lora": {"q": [3], "ffn.0": [3], "head.head": [3]}},
        parameters=3 * (20 + 22 + 14),
        dtypes={"float32": 3 * (20 + 22 + 14)},
    )
    assert report.format.lower() == f"lora, {layout}" + (" names" if layout != "peft" else "")
    assert report.details["gates"] == {"钩": 0.6}
    assert report.details["model_width"] == [10]


def test_a_kohya_lora_with_alphas_and_clip_linears(tmp_path):
    tensors = {}
    for name in ("blocks_0_self_attn_q", "blocks_4_cross_attn_k_img"):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.ones(4, 8, dtype=torch.bfloat16)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.ones(8, 4, dtype=torch.bfloat16)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"ss_output_name": "mine"})
    report = reported(
        tmp_path / "x.safetensors",
        format="LoRA, kohya/musubi names",
        task="i2v",
        noise_expert=None,
        dtypes={"bfloat16": 128, "float32": 2},
    )
    assert report.details == {"alpha_/_rank": [0.5], "model_width": [8], "ss_output_name": "mine"}
    assert "CLIP" in report.notes[0]
    assert any(line.split() == ["noise", "expert", "not", "stated"] for line in report.lines())


def test_a_lora_with_differences_in_full_says_so(tmp_path):
    key = "diffusion_model.blocks.0.norm3"
    save_file({f"{key}.diff": torch.ones(4), f"{key}.diff_b": torch.ones(4)}, tmp_path / "x.safetensors")
    report = reported(
        tmp_path / "x.safetensors", format="LoRA, ComfyUI names", linears="1 in blocks 0", ranks={}
    )
    assert "1 layers have differences in full (blocks.0.norm3)" in report.notes[0]


@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers", "shards", "pth"])
def test_a_dit_in_every_layout(dit, tmp_path, layout):
    folder = tmp_path / "high_noise_model"
    folder.mkdir()
    path = folder / "model.safetensors"
    state = {name: tensor.bfloat16() for name, tensor in dit.state_dict().items()}
    count = sum(tensor.numel() for tensor in state.values())
    if layout == "comfyui":
        save_file({f"model.diffusion_model.{name}": t for name, t in state.items()}, path)
    elif layout == "diffusers":
        save_file({to_diffusers(name): t for name, t in state.items()}, path)
    elif layout == "pth":
        torch.save(state, path := folder / "model.pth")
    elif layout == "shards":
        for number, part in enumerate((list(state)[:9], list(state)[9:]), 1):
            save_file({name: state[name] for name in part}, folder / f"m-0000{number}-of-00002.safetensors")
        path = folder
    else:
        save_file(state, path)
    shown = layout if layout in ("comfyui", "diffusers") else "original"
    report = reported(
        path,
        format=f"Wan DiT, {shown} names",
        task="t2v",
        noise_expert="high",
        parameters=count,
        dtypes={"bfloat16": count},
        experts=[],
    )
    assert report.details["config"]["num_layers"] == 3
    if layout == "shards":
        files = sorted(folder.iterdir())
        assert report.sha256 == hashlib.sha256("\n".join(map(sha256, files)).encode()).hexdigest()
        assert report.bytes == sum(file.stat().st_size for file in files)
    else:
        assert report.sha256 == sha256(path)


def test_a_dit_of_a_preset_and_of_a_pipeline(tmp_path):
    with torch.device("meta"):
        sizes = WanDiT(WanConfig.preset("tiny")).state_dict()
    tiny = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in sizes.items()}
    from dataclasses import asdict

    from wanmoe.moe_lora.wan.weights import CONFIG_KEY

    metadata = {CONFIG_KEY: json.dumps(asdict(WanConfig.preset("tiny")))}
    for part in ("transformer", "transformer_2"):
        (tmp_path / part).mkdir()
        save_file(
            {to_diffusers(name): t for name, t in tiny.items()},
            tmp_path / part / "m.safetensors",
            metadata=metadata,
        )
    assert reported(tmp_path / "transformer", noise_expert="high").details["sizes_of"] == "tiny"
    reported(tmp_path / "transformer_2", noise_expert="low")
    reported(tmp_path / "transformer_2" / "m.safetensors", noise_expert="low")


def test_what_save_dit_writes(dit, tmp_path):
    save_dit(dit, tmp_path / "dit.safetensors")
    reported(tmp_path / "dit.safetensors", format="Wan DiT, original names", task="t2v", noise_expert=None)


def test_a_whole_model_folder(dit, tmp_path):
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    for part in ("high_noise_model", "low_noise_model"):
        (tmp_path / part).mkdir()
        save_file(dit.state_dict(), tmp_path / part / "m.safetensors")
    report = reported(
        tmp_path, format="whole Wan model (Wan DiT, original names)", task="t2v", noise_expert="both"
    )
    parts = {"dit": "low_noise_model", "dit_high_noise": "high_noise_model", "vae": "Wan2.1_VAE.pth"}
    assert report.details | parts == report.details
    assert reported(tmp_path / "low_noise_model", noise_expert="low").format == "Wan DiT, original names"


def test_the_vae_in_both_layouts(tmp_path):
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(tmp_path / "vae")
    count = sum(parameter.numel() for parameter in vae.parameters())
    report = reported(tmp_path / "vae", format="Wan VAE, diffusers names", parameters=count, notes=[])
    assert report.details == {"latent_channels": 16}
    original = {
        "encoder.conv1.weight": torch.ones(4, 3, 3, 3, 3),
        "conv1.weight": torch.ones(96, 96, 1, 1, 1),
        "conv2.weight": torch.ones(48, 48, 1, 1, 1),
    }
    torch.save(original, tmp_path / "Wan2.2_VAE.pth")
    report = reported(tmp_path / "Wan2.2_VAE.pth", format="Wan VAE, original names")
    assert report.notes == ["not the Wan2.1 VAE of 16 channels, which the A14B models use"]


def test_the_text_encoder_in_both_layouts(tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 3, "num_heads": 2, "vocab_size": 20}
    UMT5EncoderModel(UMT5Config(**sizes)).save_pretrained(tmp_path / "text_encoder")
    facts = {"width": 8, "layers": 3, "vocabulary": 20}
    reported(tmp_path / "text_encoder", format="umT5 text encoder, transformers names", details=facts)
    original = {"token_embedding.weight": torch.ones(20, 8), "norm.weight": torch.ones(8)}
    original |= {f"blocks.{index}.attn.q.weight": torch.ones(8, 8) for index in range(3)}
    torch.save(original, tmp_path / "t5.pth")
    reported(tmp_path / "t5.pth", format="umT5 text encoder, original names", details=facts)


def test_the_image_encoder_in_every_layout(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14))
    model.save_pretrained(tmp_path / "clip")
    facts = {"width": 16, "layers": 2, "patch": 14}
    reported(tmp_path / "clip", format="CLIP image encoder, transformers names", details=facts)
    state = load_file(tmp_path / "clip" / "model.safetensors")
    named = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in state.items()}
    save_file(named, tmp_path / "with_prefix.safetensors")
    reported(
        tmp_path / "with_prefix.safetensors", format="CLIP image encoder, transformers names", details=facts
    )
    original = {
        "visual.patch_embedding.weight": torch.ones(16, 3, 14, 14),
        "visual.cls_embedding": torch.ones(1, 1, 16),
        **{f"visual.transformer.{index}.norm1.weight": torch.ones(16) for index in range(2)},
        "textual.token_embedding.weight": torch.ones(3, 3),
    }
    torch.save(original, tmp_path / "models_clip.pth")
    reported(tmp_path / "models_clip.pth", format="CLIP image encoder, original names", details=facts)


def test_caches_of_musubi(tmp_path):
    latent = {
        "latents_5x8x6_bfloat16": torch.ones(16, 5, 8, 6),
        "latents_image_5x8x6_bfloat16": torch.ones(20, 5, 8, 6),
    }
    save_file(latent, tmp_path / "a_wan.safetensors", metadata={"format_version": "1.0.1"})
    report = reported(tmp_path / "a_wan.safetensors", format="latent cache of musubi-tuner", task="i2v")
    assert report.details == {"latent_frames_x_height_x_width": [5, 8, 6], "format_version": "1.0.1"}
    assert any("5 x 8 x 6" in line for line in report.lines())
    save_file(
        {"varlen_t5_bfloat16": torch.ones(7, 12)}, tmp_path / "a_te.safetensors", metadata={"caption1": "钩"}
    )
    report = reported(tmp_path / "a_te.safetensors", format="text cache of musubi-tuner")
    assert report.details == {"tokens_x_width": [7, 12], "caption1": "钩"}


def test_a_folder_of_shards(tmp_path):
    manifest = {
        "format": "wanmoe-shards/2",
        "task": "t2v",
        "codec": {"name": "haar"},
        "text_encoder": {"name": "hash"},
        "n_samples": {"train": 5, "val": 2},
        "shards": [{"name": "a.tar", "bytes": 10}, {"name": "b.tar", "bytes": 20}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    report = reported(tmp_path, format="shards of wanmoe (wanmoe-shards/2)", task="t2v", bytes=30)
    assert any("train 5, val 2" in line for line in report.lines())
    for part, value in (
        ("shards", [{}]),
        ("shards", None),
        ("shards", [3]),
        ("codec", "x"),
        ("text_encoder", None),
        ("task", 3),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, part: value}))
        with pytest.raises(WanmoeError, match=f"manifest.json: {part} missing or not as"):
            inspect_file(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "other/2"}))
    with pytest.raises(WanmoeError, match="format is 'other/2'; of such folders only"):
        inspect_file(tmp_path)


def test_large_files_are_hashed_on_request_alone(dit, tmp_path, monkeypatch):
    save_dit(dit, path := tmp_path / "dit.safetensors")
    monkeypatch.setattr(module, "HASHED_BYTES", 1000)
    report = inspect_file(path)
    assert report.sha256 is None
    assert any(line.startswith("sha256") and "not computed" in line for line in report.lines())
    assert inspect_file(path, hash_large=True).sha256 == sha256(path)


def test_tensors_of_models_are_not_read(dit, tmp_path, monkeypatch):
    save_dit(dit, path := tmp_path / "dit.safetensors")

    class Refusing:
        """safe_open whose tensors cannot be read."""

        def __init__(self, *args, **kwargs):
            self.handle = opened(*args, **kwargs)

        def __getattr__(self, name):
            assert name != "get_tensor", "a tensor was read"
            return getattr(self.handle, name)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

    from wanmoe.moe_lora.wan import weight_files

    opened = weight_files.safe_open
    monkeypatch.setattr(weight_files, "safe_open", Refusing)
    monkeypatch.setattr(module, "safe_open", Refusing)
    assert inspect_file(path).task == "t2v"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.safetensors", b"no weights at all", "not a whole safetensors file"),
        ("a.safetensors", b"", "not a whole safetensors file"),
        ("a.pth", b"no weights at all", "not a whole torch file"),
        ("a.mp4", b"frames", "not a file that wanmoe reads; it knows .safetensors, .pth"),
        ("config.json", b"{}", "not a file that wanmoe reads"),
        ("a.safetensors.index.json", b"{}", "not a shard index"),
        ("absent.safetensors", None, "no such file or folder"),
    ],
)
def test_garbage_is_one_clear_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WanmoeError, match=words) as caught:
        inspect_file(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_weights_of_another_kind_are_named_by_what_they_hold(tmp_path):
    save_file({f"layer.{index}": torch.ones(1) for index in range(6)}, tmp_path / "x.safetensors")
    with pytest.raises(WanmoeError, match="none of the models, .* it holds layer.0, .* and 2 more tensors"):
        inspect_file(tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WanmoeError, match="empty: no .safetensors or .pth file in this folder"):
        inspect_file(tmp_path / "empty")


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (
            {"a.expert_up": torch.ones(1)},
            {"format": "wanmoe-adapter/1", "info": "{"},
            "description is damaged",
        ),
        ({"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(1)}, None, "LoKr, which are not supported"),
        ({"lora_moe_0.expert_lora_up.0.weight": torch.ones(1, 1)}, None, "lora_moe_0 .*is the file whole"),
    ],
)
def test_damaged_files_of_a_known_kind_are_refused_by_their_reader(tmp_path, tensors, metadata, words):
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(WanmoeError, match=words) as caught:
        inspect_file(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value) and "http" not in str(caught.value)


def test_a_damaged_description_names_its_keys_and_no_page(tmp_path):
    metadata = {"format": "wanmoe-adapter/1", "info": '{"step": "x"}'}
    save_file({"a.expert_up": torch.ones(1)}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(WanmoeError, match="adapter: Field required") as caught:
        inspect_file(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value) and "http" not in str(caught.value)
