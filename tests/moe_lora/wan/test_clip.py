"""The CLIP image encoder: the original layout against its own mathematics and against transformers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.wan import clip
from wanmoe.moe_lora.wan.clip import load_clip

WIDTH, HIDDEN, HEADS, LAYERS, PATCH, GRID = 160, 112, 2, 3, 4, 3
TOKENS = GRID**2 + 1


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """A random encoder under the names and shapes of `models_clip_open-clip-xlm-roberta-...pth`."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + 0.3 * draw(1, WIDTH)[0], f"{name}.bias": draw(1, WIDTH)[0]}

    def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 2 * draw(rows, columns), f"{name}.bias": draw(1, rows)[0]}

    state = {
        "log_scale": torch.tensor(2.6),
        "textual.token_embedding.weight": draw(7, 5),
        "visual.cls_embedding": 4 * draw(1, 1, WIDTH),
        "visual.pos_embedding": 4 * draw(1, TOKENS, WIDTH),
        "visual.head": draw(WIDTH, 24),
        "visual.patch_embedding.weight": draw(WIDTH, 3, PATCH, PATCH),
        **norm("visual.pre_norm"),
        **norm("visual.post_norm"),
    }
    for i in range(LAYERS):
        layer = f"visual.transformer.{i}"
        state |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
        state |= linear(f"{layer}.attn.to_qkv", 3 * WIDTH, WIDTH) | linear(f"{layer}.attn.proj", WIDTH, WIDTH)
        state |= linear(f"{layer}.mlp.0", HIDDEN, WIDTH) | linear(f"{layer}.mlp.2", WIDTH, HIDDEN)
    return state


def pictures(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def official(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The vision tower of Wan2.1's `wan/modules/clip.py` but for its last layer, from its description."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    size = GRID * PATCH
    pixels = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    patches = F.conv2d((pixels - mean) / std, state["visual.patch_embedding.weight"], stride=PATCH)
    x = torch.cat([state["visual.cls_embedding"].expand(len(images), 1, -1), patches.flatten(2).mT], dim=1)
    x = norm(x + state["visual.pos_embedding"], "visual.pre_norm")
    for i in range(LAYERS - 1):
        layer = f"visual.transformer.{i}"
        qkv = linear(norm(x, f"{layer}.norm1"), f"{layer}.attn.to_qkv")
        q, k, v = qkv.view(len(x), TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.0")), f"{layer}.mlp.2")
    return x


@pytest.mark.parametrize("layout", ["pth", "safetensors"])
@pytest.mark.parametrize(("height", "width"), [(12, 12), (31, 20), (8, 40)])
def test_the_original_layout_gives_the_official_tokens(original, layout, height, width, tmp_path):
    path = tmp_path / f"clip.{layout}"
    (torch.save if layout == "pth" else save_file)(original, path)
    encoder = load_clip(path)
    assert (encoder.dim, encoder.tokens, encoder.image_size) == (WIDTH, TOKENS, 12)
    assert len(encoder.fingerprint) == 64
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in encoder.parameters())
    images = pictures(height, width)
    before = images.clone()
    tokens = encoder(images)
    truth = official(original, images)
    assert tokens.shape == (2, TOKENS, WIDTH) and truth.std() > 0.3
    assert (truth[0] - truth[1]).abs().max() > 0.1, "the tokens do not depend on the picture"
    torch.testing.assert_close(tokens, truth, atol=1e-4, rtol=1e-4)
    assert torch.equal(images, before)


@pytest.mark.parametrize("layout", ["folder", "model folder"])
def test_a_folder_gives_what_transformers_gives(layout, tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=12,
        patch_size=4, hidden_act="gelu", initializer_factor=8.0,
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path if layout == "folder" else tmp_path / "image_encoder")
    encoder = load_clip(tmp_path)
    images = pictures(12, 12)
    pixels = (images * 0.5 + 0.5 - encoder.mean) / encoder.std
    with torch.no_grad():
        truth = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        last = model(pixel_values=pixels).last_hidden_state
    tokens = encoder(images)
    torch.testing.assert_close(tokens, truth, atol=1e-5, rtol=1e-5)
    assert (tokens - last).abs().max() > 0.1, "the last layer must not run"
    half = load_clip(tmp_path, dtype=torch.bfloat16)
    assert half(images).dtype == torch.bfloat16 and len(half.fingerprint) == 64


def test_original_tensors_are_read_one_at_a_time_and_the_text_tower_not_at_all(
    original, tmp_path, monkeypatch
):
    save_file(original, tmp_path / "clip.safetensors")
    read: list[str] = []
    open_weights = clip.open_weights

    def counting(source):
        weights = open_weights(source)

        def counted(name, stored):
            return stored._replace(read=lambda: (read.append(name), stored.read())[1])

        return weights._replace(tensors={name: counted(name, t) for name, t in weights.tensors.items()})

    monkeypatch.setattr(clip, "open_weights", counting)
    encoder = load_clip(tmp_path / "clip.safetensors", dtype=torch.float16)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float16}
    wanted = {name for name in original if name.startswith("visual.") and name != "visual.head"}
    assert set(read) == wanted
    assert all(read.count(name) == (3 if "to_qkv" in name else 1) for name in wanted)


def test_a_missing_or_other_file_is_one_clear_line(original, tmp_path):
    def without(part: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in original.items() if part not in name}

    save_file(original, whole := tmp_path / "whole.safetensors")
    (cut := tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1000])
    save_file(without("visual"), text := tmp_path / "text.safetensors")
    save_file(without("transformer.1.attn.proj"), short := tmp_path / "short.safetensors")
    save_file(
        {**original, "visual.transformer.0.gate": torch.zeros(1)}, other := tmp_path / "other.safetensors"
    )
    square = {**original, "visual.pos_embedding": torch.zeros(1, 12, WIDTH)}
    save_file(square, odd := tmp_path / "odd.safetensors")
    (empty := tmp_path / "empty").mkdir()
    for path, match in {
        tmp_path / "absent.pth": "no such file or folder",
        cut: "not a whole safetensors file",
        text: r"not the CLIP of Wan2\.1: embeddings\.patch_embedding\.weight is missing",
        short: r"2 missing: encoder\.layers\.1\.self_attn\.out_proj\.",
        other: r"unknown key 'visual\.transformer\.0\.gate'",
        odd: "width of 160 and 12 positions",
        empty: "no config.json",
    }.items():
        with pytest.raises(WanmoeError, match=match) as caught:
            load_clip(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    ).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "class_embedding" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(WanmoeError, match=r"1 weights are missing: .*class_embedding"):
        load_clip(tmp_path)


def test_only_pictures_are_encoded(original, tmp_path):
    save_file(original, tmp_path / "clip.safetensors")
    with pytest.raises(WanmoeError, match=r"pictures \[B, 3, H, W\], but got \[3, 8, 8\]"):
        load_clip(Path(tmp_path) / "clip.safetensors")(torch.zeros(3, 8, 8))
