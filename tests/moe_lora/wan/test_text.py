"""Text encoders: the stand-in's hash, and umT5 against direct calls of transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.wan import text as text_module
from wanmoe.moe_lora.wan.text import (
    HashTextEncoder,
    UMT5TextEncoder,
    clean,
    encode_prompts,
    hash_tokens,
    load_text_encoder,
)

PROMPTS = ["a grasper holds tissue", "hook", ""]


# -------------------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("  two \n\t words ", "two words"),
        ("scissors &amp;amp; hook", "scissors & hook"),
        ("&lt;b&gt;", "<b>"),
        ("doctorâ€™s", "doctor's"),
        ("电凝钩　切割", "电凝钩 切割"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_does(dirty: str, expected: str) -> None:
    assert clean(dirty) == expected


# -------------------------------------------------------------------------------------------- stand-in


def test_tokens_are_words_and_chinese_characters_with_their_pairs() -> None:
    assert hash_tokens("A Hook, a_hook: 电凝钩cut 剪") == [
        *("a", "hook", "a", "hook"),
        *("电", "电凝", "凝", "凝钩", "钩", "cut", "剪"),
    ]


def test_a_token_has_one_vector_whatever_stands_around_it() -> None:
    encoder = HashTextEncoder(dim=16)
    first, second = encode_prompts(encoder, ["Scissors cut", "the scissors"])
    torch.testing.assert_close(first[0], second[1], atol=0, rtol=0)
    assert (first[0] - first[1]).abs().max() > 0.1
    torch.testing.assert_close(first[-1], second[-1], atol=0, rtol=0)  # the end token


def test_vectors_have_unit_variance_and_are_unlike() -> None:
    encoder = HashTextEncoder(dim=256, max_length=101)
    vectors = encode_prompts(encoder, [" ".join(f"word{i}" for i in range(100))])[0]
    assert vectors.shape == (101, 256)
    assert vectors.mean().abs() < 0.02
    assert abs(vectors.var() - 1) < 0.03
    cosine = torch.corrcoef(vectors) - torch.eye(101)
    assert cosine.abs().max() < 0.35


def test_vectors_are_the_same_in_every_process() -> None:
    code = (
        "from wanmoe.moe_lora.wan.text import HashTextEncoder, encode_prompts\n"
        "e = encode_prompts(HashTextEncoder(dim=8), ['hook 钩'])[0]\n"
        "print(e[0, :3].tolist(), e[1, :3].tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    # Pinned: shards made on one machine are read on another.
    here = encode_prompts(HashTextEncoder(dim=8), ["hook 钩"])[0]
    torch.testing.assert_close(
        here[:2, :3],
        torch.tensor([[-0.381196, 1.563349, 0.164584], [0.54239, -1.692216, 0.58046]]),
        atol=1e-6,
        rtol=0,
    )


def test_padding_is_zero_and_trimmed() -> None:
    encoder = HashTextEncoder()
    ids, mask = encoder.tokenize(PROMPTS)
    assert ids.shape == mask.shape == (3, 5)
    assert mask.sum(1).tolist() == [5, 2, 1]
    embeddings = encoder(ids, mask)
    assert embeddings.shape == (3, 5, 64)
    assert not embeddings[mask == 0].any()
    assert [tuple(row.shape) for row in encode_prompts(encoder, PROMPTS)] == [(5, 64), (2, 64), (1, 64)]


def test_long_prompts_are_cut_and_keep_the_end_token() -> None:
    encoder = HashTextEncoder(max_length=4)
    long, end = encode_prompts(encoder, ["a b c d e f", ""])
    assert long.shape == (4, 64)
    torch.testing.assert_close(long[-1], end[0], atol=0, rtol=0)


def test_load_names_the_stand_in() -> None:
    encoder = load_text_encoder("hash", dim=48, max_length=7)
    assert (encoder.name, encoder.stand_in, encoder.dim, encoder.max_length) == ("hash", True, 48, 7)
    assert encoder.fingerprint != HashTextEncoder().fingerprint
    assert HashTextEncoder().fingerprint == load_text_encoder("hash").fingerprint
    with pytest.raises(WanmoeError, match="dim"):
        HashTextEncoder(dim=0)


# ------------------------------------------------------------------------------------------------ umT5


@pytest.fixture(scope="module")
def model() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=24,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
    )
    model = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["<pad>", "</s>", "<unk>", "a", "grasper", "holds", "tissue", "hook"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def _original_layout(model: UMT5EncoderModel) -> dict[str, torch.Tensor]:
    """The key names of Wan's umT5 file."""
    state = model.state_dict()
    out = {
        "token_embedding.weight": state["shared.weight"],
        "norm.weight": state["encoder.final_layer_norm.weight"],
    }
    for i in range(model.config.num_layers):
        attention = f"encoder.block.{i}.layer.0."
        feed = f"encoder.block.{i}.layer.1."
        table = {f"attn.{p}": f"{attention}SelfAttention.{p}" for p in "qkvo"} | {
            "norm1": f"{attention}layer_norm",
            "pos_embedding.embedding": f"{attention}SelfAttention.relative_attention_bias",
            "norm2": f"{feed}layer_norm",
            "ffn.gate.0": f"{feed}DenseReluDense.wi_0",
            "ffn.fc1": f"{feed}DenseReluDense.wi_1",
            "ffn.fc2": f"{feed}DenseReluDense.wo",
        }
        for original, ours in table.items():
            out[f"blocks.{i}.{original}.weight"] = state[f"{ours}.weight"].clone()
    return out


@pytest.mark.parametrize("layout", ["folder", "model folder", "pth", "safetensors", "pth as Wan ships it"])
def test_every_layout_equals_transformers(
    model: UMT5EncoderModel, tokenizer_folder: Path, layout: str, tmp_path: Path
) -> None:
    tokenizer_path: Path | None = tokenizer_folder
    if layout == "folder":
        model.save_pretrained(path := tmp_path / "umt5")
    elif layout == "model folder":
        model.save_pretrained((path := tmp_path) / "text_encoder")
        (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
        tokenizer_path = None
    elif layout == "safetensors":
        save_file(_original_layout(model), path := tmp_path / "t5.safetensors")
    else:
        torch.save(_original_layout(model), path := tmp_path / "models_t5.pth")
        if layout != "pth":
            (tmp_path / "google").mkdir()
            (tmp_path / "google" / "umt5-xxl").symlink_to(tokenizer_folder)
            tokenizer_path = None
    encoder = load_text_encoder(path, tokenizer_path=tokenizer_path)
    assert isinstance(encoder, UMT5TextEncoder)
    assert (encoder.dim, encoder.stand_in, encoder.max_length) == (32, False, 512)
    assert len(encoder.fingerprint) == 64
    ids, mask = encoder.tokenize(PROMPTS)
    assert ids.tolist()[0] == [3, 4, 5, 6, 1]
    assert mask.sum(1).tolist() == [5, 2, 1]
    for prompt_ids, length, row in zip(ids, mask.sum(1), encode_prompts(encoder, PROMPTS), strict=True):
        with torch.no_grad():
            alone = model(input_ids=prompt_ids[None, :length]).last_hidden_state[0]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)
        assert alone.std() > 0.1
    assert not encoder(ids, mask)[mask == 0].any()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_tensor_of_the_original_file_is_read_once_and_the_two_names_of_one_stay_one(
    model: UMT5EncoderModel,
    tokenizer_folder: Path,
    dtype: torch.dtype | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.save(_original_layout(model), path := tmp_path / "models_t5.pth")
    read: list[str] = []
    open_weights = text_module.open_weights

    def counted(source):  # type: ignore[no-untyped-def]
        weights = open_weights(source)

        def one(name, stored):  # type: ignore[no-untyped-def]
            return stored._replace(read=lambda: (read.append(name), stored.read())[1])

        return weights._replace(tensors={name: one(name, t) for name, t in weights.tensors.items()})

    monkeypatch.setattr(text_module, "open_weights", counted)
    encoder = load_text_encoder(path, tokenizer_path=tokenizer_folder, dtype=dtype)
    assert sorted(read) == sorted(_original_layout(model))
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight
    assert {parameter.dtype for parameter in encoder.parameters()} == {dtype or torch.float32}


def test_prompts_are_cut_to_max_length(
    model: UMT5EncoderModel, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path, tokenizer_path=tokenizer_folder, max_length=3, dtype=torch.bfloat16)
    ids, mask = encoder.tokenize(["a grasper holds tissue"])
    assert ids.tolist() == [[3, 4, 1]]
    assert encoder(ids, mask).dtype == torch.bfloat16


def test_a_tokeniser_is_needed(model: UMT5EncoderModel, tmp_path: Path) -> None:
    torch.save(_original_layout(model), path := tmp_path / "models_t5.pth")
    with pytest.raises(WanmoeError, match="tokenizer_path"):
        load_text_encoder(path)
    with pytest.raises(WanmoeError, match="absent"):
        load_text_encoder(path, tokenizer_path=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WanmoeError, match="empty"):
        load_text_encoder(path, tokenizer_path=tmp_path / "empty")


def test_a_missing_or_broken_file_is_one_clear_line(
    model: UMT5EncoderModel, tokenizer_folder: Path, tmp_path: Path
) -> None:
    state = _original_layout(model)
    torch.save(state, whole := tmp_path / "whole.pth")
    (cut := tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:-2000])
    torch.save({**state, "surprise.weight": torch.zeros(1)}, surprise := tmp_path / "surprise.pth")
    torch.save({k: v for k, v in state.items() if "blocks.1.ffn" not in k}, short := tmp_path / "short.pth")
    torch.save({"norm.weight": torch.zeros(3)}, bare := tmp_path / "bare.pth")
    (empty := tmp_path / "empty").mkdir()
    model.save_pretrained(partial := tmp_path / "partial")
    state = {key: value.clone() for key, value in model.state_dict().items() if "embed_tokens" not in key}
    kept = {key: value for key, value in state.items() if "layer_norm" not in key}
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path / "absent.pth", cut, surprise, short, bare, empty, partial):
        with pytest.raises(WanmoeError) as caught:
            load_text_encoder(path, tokenizer_path=tokenizer_folder)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(WanmoeError, match="width is 32, but 64"):
        load_text_encoder(whole, tokenizer_path=tokenizer_folder, dim=64)
