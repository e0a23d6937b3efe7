"""Text encoders: umT5 as Wan uses it, and a hash of words that stands in for it where there are no weights.

B prompts, L tokens of the longest prompt (end token included), D text width, n real tokens of one prompt.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import ftfy
import numpy as np
import torch
from torch import Tensor, nn

from ..errors import WanmoeError
from .codec import file_digest, first_line, load_pretrained
from .weight_files import StoredTensor, fill_module, open_weights

MAX_LENGTH = 512


class TextEncoder(Protocol):
    """What the rest of the program knows of a text encoder."""

    name: str
    stand_in: bool
    dim: int
    max_length: int

    @property
    def fingerprint(self) -> str:
        """Digest of everything that fixes the embeddings."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 `[B, L]`; cleaned, cut to `max_length`, padded to the longest prompt."""
        ...

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings `[B, L, D]`, zero at the padding."""
        ...


def clean(prompt: str) -> str:
    """Prompt as Wan's tokeniser cleans it: mended encoding, HTML entities resolved twice, single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


@torch.no_grad()
def encode_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> list[Tensor]:
    """Embeddings `[n, D]` of every prompt, trimmed to its real length."""
    ids, mask = encoder.tokenize(prompts)
    embeddings = encoder(ids, mask)
    return [row[:length] for row, length in zip(embeddings, mask.sum(1).tolist(), strict=True)]


# ------------------------------------------------------------------------------------------------- stand-in

# Scripts that are written without spaces: Chinese, Japanese kana, Hangul.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_PIECE = re.compile(rf"(?P<cjk>[{_CJK}]+)|(?P<word>[^\W_{_CJK}]+)")
_END = "</s>"


def hash_tokens(prompt: str) -> list[str]:
    """Tokens of the stand-in encoder: lower-case words, and characters and pairs of them in CJK runs."""
    tokens: list[str] = []
    for match in _PIECE.finditer(clean(prompt).lower()):
        if match["word"]:
            tokens.append(match["word"])
            continue
        run = match["cjk"]
        for index, character in enumerate(run):
            tokens.append(character)
            if index + 1 < len(run):
                tokens.append(run[index : index + 2])
    return tokens


def _token_id(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=7).digest(), "big")


@lru_cache(maxsize=65536)
def _token_vector(token_id: int, dim: int) -> Tensor:
    """Uniform numbers of mean 0 and variance 1, the same on every machine and version of every library."""
    stream = hashlib.shake_128(token_id.to_bytes(8, "big")).digest(4 * dim)
    uniform = np.frombuffer(stream, dtype="<u4").astype(np.float64) / 2**32 - 0.5
    return torch.from_numpy(uniform * 12**0.5).float()


class HashTextEncoder:
    """Stand-in text encoder: every token has a fixed random vector of unit variance, drawn from its hash.

    It knows which words are the same and nothing of what they mean. An end token closes every prompt, so
    that an empty one has an embedding too.
    """

    name = "hash"
    stand_in = True

    def __init__(self, dim: int = 64, max_length: int = 32) -> None:
        if dim < 1 or max_length < 1:
            raise WanmoeError(f"text encoder hash: dim {dim} and max_length {max_length} must be at least 1")
        self.dim = dim
        self.max_length = max_length

    @property
    def fingerprint(self) -> str:
        """Digest of the sizes and of a probe of the vectors."""
        probe = _token_vector(_token_id(_END), self.dim).numpy().tobytes()
        return hashlib.sha256(f"hash/1 {self.dim} {self.max_length} ".encode() + probe).hexdigest()

    def to(self, device: str | torch.device) -> HashTextEncoder:
        """Itself: the vectors are made on the CPU and follow the ids to their device."""
        return self

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 `[B, L]`; an id is the hash of its token, 0 pads."""
        rows = [
            [_token_id(token) for token in (*hash_tokens(prompt)[: self.max_length - 1], _END)]
            for prompt in prompts
        ]
        length = max((len(row) for row in rows), default=0)
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=torch.int64)
        return ids.view(len(rows), length), mask.view(len(rows), length)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings `[B, L, D]` in fp32, zero at the padding."""
        vectors = [_token_vector(token, self.dim) for token in ids.flatten().tolist()]
        table = torch.stack(vectors) if vectors else torch.zeros(0, self.dim)
        return table.view(*ids.shape, self.dim).to(ids.device) * mask.unsqueeze(-1)


# ---------------------------------------------------------------------------------------------------- umT5


class UMT5TextEncoder(nn.Module):
    """The umT5 encoder (transformers' `UMT5EncoderModel`) with its tokeniser.

    Prompts are padded to the longest of the batch, not to `max_length`: the padding is masked, so the
    embeddings are the same.
    """

    name = "umt5"
    stand_in = False

    def __init__(self, model: Any, tokenizer: Any, files: list[Path], max_length: int = MAX_LENGTH) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.files = files
        self.dim: int = model.config.d_model
        self.max_length = max_length

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the files the weights came from."""
        return file_digest(self.files)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 `[B, L]`, with the end token."""
        batch = self.tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"]

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings `[B, L, D]` in the dtype of the weights, zero at the padding."""
        device = next(self.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask.unsqueeze(-1).to(hidden.dtype)


def load_text_encoder(
    path: str | Path,
    *,
    tokenizer_path: str | Path | None = None,
    dim: int | None = None,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> HashTextEncoder | UMT5TextEncoder:
    """Text encoder named by `path`: "hash", a Hugging Face folder, or `models_t5_umt5-xxl-enc-bf16.pth`.

    A folder may be the encoder's own or a whole converted model with `text_encoder/` and `tokenizer/` in it.
    Sizes are read from the file. Without `tokenizer_path` the tokeniser is looked for in the folder, beside
    it (`tokenizer/`), and beside an original file (`google/umt5-xxl/`, where Wan ships it).

    Args:
        dim: width; sets it for "hash" (64), and is checked against the file otherwise.
        max_length: prompts are cut to this many tokens (32 for "hash", 512 for umT5).
        dtype: of the weights; as in the file by default.

    Raises `WanmoeError` where a file is missing, broken, of other sizes, or has no tokeniser.
    """
    if str(path) == HashTextEncoder.name:
        return HashTextEncoder(dim or 64, max_length or 32)
    path = Path(path)
    if path.is_dir():
        path = path / "text_encoder" if (path / "text_encoder" / "config.json").is_file() else path
        places = [path, path.parent / "tokenizer"]
        tokenizer = _load_tokenizer(path, tokenizer_path, places)
        model = _load_folder(path, dtype)
        files = sorted(
            p for p in path.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json"
        )
    elif path.is_file():
        tokenizer = _load_tokenizer(path, tokenizer_path, [path.parent / "google" / "umt5-xxl"])
        model = _load_original(path, dtype, device)
        files = [path]
    else:
        raise WanmoeError(
            f"text encoder {path}: no such file or folder; give 'hash', a umT5 file or a Hugging Face folder"
        )
    if dim is not None and dim != model.config.d_model:
        raise WanmoeError(f"text encoder {path}: its width is {model.config.d_model}, but {dim} is asked for")
    return UMT5TextEncoder(model, tokenizer, files, max_length or MAX_LENGTH).to(device)


def _load_tokenizer(path: Path, given: str | Path | None, places: list[Path]) -> Any:
    from transformers import AutoTokenizer

    found = [p for p in places if any((p / n).is_file() for n in ("tokenizer.json", "spiece.model"))]
    if given is None and not found:
        raise WanmoeError(
            f"text encoder {path}: no tokeniser beside it (looked in {', '.join(map(str, places))}); "
            "give tokenizer_path, a folder with the files of google/umt5-xxl"
        )
    folder = Path(given) if given is not None else found[0]
    if not folder.is_dir():
        raise WanmoeError(
            f"tokenizer_path {folder}: no such folder; give one with the files of google/umt5-xxl"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise WanmoeError(f"tokenizer_path {folder}: cannot be loaded: {first_line(error)}") from error


def _load_folder(folder: Path, dtype: torch.dtype | None) -> Any:
    from transformers import UMT5EncoderModel

    if not (folder / "config.json").is_file():
        raise WanmoeError(f"text encoder {folder}: the folder has no config.json, so it is no umT5 encoder")
    return load_pretrained(UMT5EncoderModel, f"text encoder {folder}", folder, "umT5", dtype=dtype or "auto")


_LAYER_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def _from_original_names(path: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Key names of the original umT5 file -> those of transformers."""
    renamed: dict[str, StoredTensor] = {}
    for key, value in stored.items():
        parts = key.removesuffix(".weight").split(".", 2)
        if parts[0] == "token_embedding":
            renamed["shared.weight"] = renamed["encoder.embed_tokens.weight"] = value
        elif parts[0] == "norm":
            renamed["encoder.final_layer_norm.weight"] = value
        elif len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit() and parts[2] in _LAYER_NAMES:
            renamed[f"encoder.block.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"] = value
        else:
            raise WanmoeError(f"text encoder {path}: unknown key {key!r}; expected Wan's umT5 encoder file")
    return renamed


def _load_original(path: Path, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    stored = _from_original_names(path, open_weights(path).tensors)
    first = "encoder.block.0.layer."
    needed = ("shared.weight", f"{first}0.SelfAttention.q.weight", f"{first}1.DenseReluDense.wi_0.weight")
    bias = f"{first}0.SelfAttention.relative_attention_bias.weight"
    if missing := [key for key in (*needed, bias) if len(stored[key].shape if key in stored else ()) != 2]:
        raise WanmoeError(f"text encoder {path}: the weights of {', '.join(missing)} are missing")
    (vocabulary, width), (attention, _), (hidden, _) = (stored[key].shape for key in needed)
    buckets, heads = stored[bias].shape
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=attention // heads,
        d_ff=hidden,
        num_layers=1 + max(int(key.split(".")[2]) for key in stored if key.startswith("encoder.block.")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    with torch.device("meta"):
        model: Any = UMT5EncoderModel(config)
    fill_module(model, stored, f"text encoder {path}", dtype=dtype, device=device)
    return model
