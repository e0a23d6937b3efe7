"""Router prompts as files: a list of one's own, and the pooled texts that lie beside the shards.

The router sees nothing of a text but the mean over its tokens, so that is all that is stored: one safetensors
file with `pooled` [N, D], fp16 or bf16, and `prompts`, the bytes of a JSON list of [text, {name: weight}].

Letters: N prompts, K of them in a draw, D text width, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from ...moe_lora.instruments import ExpertSet
from .router_prompts import RouterPrompt

ROUTER_PROMPTS = "router_prompts.safetensors"
NOISE = 2.0
"""Of `PromptSampler`, in deviations between prompts: 1 to 4 do as well, without there is less agreement on
sentences of other words."""


class RouterPrompts(NamedTuple):
    """The prompts of a folder of shards."""

    pooled: Tensor
    """[N, D]: mean over the tokens of each."""
    texts: tuple[str, ...]
    weights: tuple[tuple[tuple[str, float], ...], ...]
    """(name, weight) pairs of each."""


class PromptSampler:
    """Draws prompts with their targets, each moved as other words around the same keyword would move it.

    A mean over tokens is the keyword's part and that of all others. Normal noise, for each prompt as large as
    `noise` deviations at the most, stands for words that no prompt has; a router that trains without learns
    the prompts by heart.

    Args:
        pooled: [N, D].
        taught: [N, E], what the router should say.
    """

    def __init__(self, pooled: Tensor, taught: Tensor, noise: float = NOISE) -> None:
        self.read = F.layer_norm(pooled.float(), pooled.shape[-1:])  # as the router reads them
        self.taught = taught
        self.scale = noise * self.read.std(0, correction=0)

    def __call__(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Pooled texts [K, D] and targets [K, E]; the same for the same state of the generator."""
        chosen = torch.randint(len(self.read), (count,), generator=generator)
        share = torch.rand(count, 1, generator=generator)
        moved = torch.randn(count, self.read.shape[1], generator=generator) * share * self.scale
        return self.read[chosen] + moved, self.taught[chosen]


def read_prompt_list(path: str | Path, experts: ExpertSet) -> list[RouterPrompt]:
    """Prompts of a file with a JSON object a line: `prompt`, and `instruments` as names, which share evenly,
    or as {name: weight}.

    Names are those of the experts or their keywords, or of the other surgical taxonomy. Raises `WanmoeError`
    that names file, line and cause.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WanmoeError(f"{path}: not a text file in UTF-8 ({error.reason})") from error
    except OSError as error:
        raise WanmoeError(f"{path}: the router prompts cannot be read: {error.strerror}") from error
    lines = enumerate(text.split("\n"), start=1)
    prompts = [_prompt(line, f"{path}:{number}", experts) for number, line in lines if line.strip()]
    if not prompts:
        raise WanmoeError(f"{path}: holds no router prompt")
    return prompts


def _prompt(line: str, origin: str, experts: ExpertSet) -> RouterPrompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise WanmoeError(f"{origin}: not JSON: {error}") from error
    if not isinstance(row, dict) or row.keys() != {"prompt", "instruments"}:
        raise WanmoeError(f"{origin}: expected an object with prompt and instruments, got {line[:60]}")
    text, given = row["prompt"], row["instruments"]
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        given = dict.fromkeys(given, 1.0)
    if not isinstance(text, str) or not text.strip():
        raise WanmoeError(f"{origin}: prompt is a text, got {text!r}")
    if not isinstance(given, dict) or not all(_is_weight(weight) for weight in given.values()):
        raise WanmoeError(f"{origin}: instruments are names, or weights by name, got {given!r}")
    total = sum(given.values())
    if not 0 < total < math.inf:
        raise WanmoeError(f"{origin}: instruments need a weight above zero in all, got {given!r}")
    try:
        shares = experts.shares(given.items())
    except WanmoeError as error:
        raise WanmoeError(f"{origin}: {error}") from error
    return RouterPrompt(text, {name: share / total for name, share in shares.items()})


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def pack_prompts(pooled: Tensor, prompts: Sequence[RouterPrompt]) -> bytes:
    """The file of these prompts; the same bytes for the same prompts. `pooled` [N, D], fp16 or bf16."""
    text = json.dumps(prompts, ensure_ascii=False, separators=(",", ":"))
    letters = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return save({"pooled": pooled.contiguous(), "prompts": letters})


def unpack_prompts(data: bytes, text_dim: int) -> RouterPrompts:
    """What `pack_prompts` wrote; `ValueError` says in which way it is something else."""
    try:
        tensors = load(data)
        pooled, letters = tensors["pooled"], tensors["prompts"]
        rows = json.loads(letters.numpy().tobytes())
        texts = tuple(str(text) for text, _ in rows)
        weights = tuple(tuple((str(k), float(v)) for k, v in own.items()) for _, own in rows)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a file of router prompts: {type(error).__name__} {error}") from error
    if tuple(pooled.shape) != (len(texts), text_dim):
        raise ValueError(f"pooled is {list(pooled.shape)}, expected {[len(texts), text_dim]}")
    if not pooled.is_floating_point() or not torch.isfinite(pooled).all():
        raise ValueError("pooled holds values that are no finite numbers")
    return RouterPrompts(pooled, texts, weights)
