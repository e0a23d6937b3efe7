"""The parts of a pipeline from their files: sides with their adapters, and the encoder of prompts."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moe_lora.adapter import Adapter, AdapterConfig
from ..moe_lora.adapter_file import has_router, is_adapter, load_adapter, read_adapter, read_adapter_info
from ..moe_lora.block_store import BlockStore
from ..moe_lora.errors import WanmoeError
from ..moe_lora.fork_file import is_fork, read_fork
from ..moe_lora.instruments import ExpertSet, known_experts
from ..moe_lora.interop import import_adapter
from ..moe_lora.lora_file import read_lora
from ..moe_lora.lora_merge import LoRASpec
from ..moe_lora.ring import BlockRing
from ..moe_lora.streamed_module import stream_blocks
from ..moe_lora.wan.clip import CLIPImageEncoder, load_clip
from ..moe_lora.wan.codec import Codec, HaarCodec, WanVAE
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.text import TextEncoder, UMT5TextEncoder, encode_prompts
from ..moe_lora.wan.weights import dit_hash, load_dit, read_dit_config

_log = logging.getLogger(__name__)
_CPU = torch.device("cpu")

TASKS = ("t2v-A14B", "i2v-A14B", "t2v-1.3B", "i2v-14B", "tiny", "t2v", "i2v")

PathLike = str | Path


def adapter_paths(
    given: PathLike | Sequence[PathLike | None] | None,
    two_sides: bool,
    any_base: bool,
    config_file: Path | None = None,
) -> dict[str, Path]:
    """Adapter file of each side ("low", "high"), from one file or a pair (low, high)."""
    if given is None:
        return {}
    if not isinstance(given, str | Path):
        if len(given) != 2:
            raise WanmoeError(f"lora_moe_weights holds {len(given)} files; give one, or two (low, high)")
        paths = {n: Path(path) for n, path in zip(("low", "high"), given, strict=True) if path is not None}
    else:
        path = Path(given)
        side = noise_expert_of(path, config_file) if two_sides else "low"
        paths = {name: path for name in ("low", "high") if side in (name, "both")}
    if two_sides:
        return paths
    if "high" in paths:
        raise WanmoeError(
            f"adapter {paths['high']} is for a high-noise model, and there is only one model: give "
            "dit_high_noise_path (--dit_high_noise) too"
        )
    for path in paths.values():
        if noise_expert_of(path, config_file) == "high" and not any_base:
            raise WanmoeError(
                f"adapter {path} belongs to the high noise expert, and there is only one model: give that "
                "expert as dit_high_noise_path (--dit_high_noise), or pass any_base (--any_base) to load it "
                "all the same"
            )
    return paths


def noise_expert_of(path: Path, config_file: Path | None = None) -> str:
    """The side that an adapter or LoRA file says it belongs to; "both" where it does not say."""
    if is_adapter(path):
        return read_adapter_info(path).noise_expert
    stated = read_fork(path, config_file).noise_expert if is_fork(path) else read_lora(path).noise_expert
    return stated or "both"


def experts_of(path: Path, config_file: Path | None = None) -> ExpertSet:
    """The experts of an adapter file, ours or the fork's; those of a plain LoRA are our defaults."""
    if is_adapter(path):
        return read_adapter_info(path).adapter.expert_set
    if is_fork(path):
        return ExpertSet(known_experts(read_fork(path, config_file).expert_names))
    return AdapterConfig().expert_set


def check_task(task: str | None, model: str, path: Path) -> None:
    """Raises WanmoeError where a task has no such name or is not that of the model."""
    if task is None:
        return
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)[0]
        raise WanmoeError(f"unknown task {task!r}; nearest is {near!r}, known are: {', '.join(TASKS)}")
    wanted = "i2v" if task.startswith("i2v") else "t2v"
    if model != wanted:
        raise WanmoeError(f"{path}: this is a {model} model, but the task is {task}")


def load_model(
    name: str,
    path: Path,
    adapter_path: Path | None,
    *,
    dtype: torch.dtype | None,
    any_base: bool,
    loras: Sequence[LoRASpec] = (),
    config_file: Path | None = None,
    fold_timestep: bool = False,
    store: BlockStore | None = None,
) -> tuple[WanDiT, Adapter | None]:
    """The DiT of a side in host memory, or its blocks in `store`, other LoRAs merged in, and its adapter of
    any known format."""
    ours = adapter_path is not None and is_adapter(adapter_path)
    fits: dict[str, Any] = {"noise_expert": name, "any_base": any_base}
    base: str | None = None
    if adapter_path is not None and ours:
        info, tensors = read_adapter(adapter_path)
        if info.router.mode == "learned" and not has_router(tensors):
            raise WanmoeError(
                f"{adapter_path}: it says routing is learned, but holds no router; "
                'train stage c from it, or set router.mode = "rule"'
            )
        base = dit_hash(path) if info.base_sha256 and not any_base else None
        # On a model without values first: an adapter that does not fit shows before the weights are read.
        with torch.device("meta"):
            sketch = WanDiT(read_dit_config(path)[0])
        load_adapter(adapter_path, sketch, base_sha256=base, **fits)
    wanted = [lora for lora in loras if lora.serves(name)]
    dit = load_dit(path, dtype=dtype, loras=wanted, store=store)
    for lora in wanted:
        _log.info("merged %s into the %s-noise model, strength %g", lora.path, name, lora.strength)
    if adapter_path is None:
        return dit, None
    if ours:
        return dit, load_adapter(adapter_path, dit, base_sha256=base, **fits)
    more: dict[str, Any] = {"config_file": config_file, "fold_timestep": fold_timestep}
    return dit, import_adapter(adapter_path, dit, **fits, **more)


def check_loras(loras: Sequence[LoRASpec], sides: Iterable[str]) -> None:
    """Raises WanmoeError for a LoRA of a side that there is not."""
    for lora in loras:
        if not any([lora.serves(side) for side in sides]):  # a list: each side is checked
            raise WanmoeError(
                f"lora {lora.path} is for the high-noise model, and there is only one model: give "
                "dit_high_noise_path (--dit_high_noise) too, or write :low behind its name"
            )


def check_stored(config: WanConfig, stream: int, stored: bool, merged: bool, compiled: bool) -> None:
    """Raises WanmoeError for what does not go with blocks that stream or are quantised (`stored`)."""
    if not 0 <= stream <= config.num_layers:
        raise WanmoeError(f"--stream {stream}: the model has {config.num_layers} blocks; give 0 to as many")
    for given, name in ((merged, "--merged"), (compiled, "--compile")):
        if stored and given:
            raise WanmoeError(
                f"{name} needs blocks whose weights are on the card to stay and as they are: leave {name} "
                "out, or --stream and --quantised"
            )


@contextlib.contextmanager
def on_device(codec: HaarCodec | WanVAE, device: torch.device) -> Iterator[Codec]:
    """The codec, on the device for as long as it is used and in host memory before and after."""
    codec.to(device)
    try:
        yield codec
    finally:
        codec.to("cpu")


def decode_anyhow(codec: Codec, latent: Tensor, tile: int) -> Tensor:
    """The decoded latent; in tiles of so many pixels where the card has no memory for it whole: what was
    computed for it is worth more."""
    try:
        return codec.decode(latent)
    except torch.OutOfMemoryError:
        if not isinstance(codec, WanVAE) or codec.tiled:
            raise
    _log.warning("the card has no memory to decode the video at once; in tiles of %d pixels then", tile)
    codec.tile(tile)
    return codec.decode(latent)


def clip_of(config: WanConfig, path: PathLike | None, dit: Path) -> CLIPImageEncoder | None:
    """The image encoder of a model that takes one; raises WanmoeError where it is not given."""
    if not config.image_dim:
        if path is not None:
            _log.info("clip_path is not used: this model has no image encoder")
        return None
    if path is None:
        raise WanmoeError(f"{dit}: a Wan2.1 i2v model needs clip_path (--clip)")
    return load_clip(path)


class PromptEncoder:
    """A text encoder that is in memory while prompts are encoded, and not while a video is made.

    `load` is called at once, so that a wrong path shows before any other file is read, and again when prompts
    come that have no embedding yet: `prepare` all of them together.

    Args:
        device: where umT5 computes. On a card its blocks stream from host memory: whole it has 11 GB.
    """

    def __init__(self, load: Callable[[], TextEncoder], device: torch.device = _CPU) -> None:
        self._load, self._device = load, device
        self._streams = device.type != "cpu"
        self._encoder: TextEncoder | None = load()
        self.name, self.stand_in = self._encoder.name, self._encoder.stand_in
        self._embeddings: dict[str, Tensor] = {}

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encodes what of these is not encoded yet, and releases the encoder."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if missing:
            encoder = self._encoder or self._load()
            ring: BlockRing | None = None
            if self._streams and isinstance(encoder, UMT5TextEncoder):
                ring, stack = BlockRing(self._device), encoder.model.encoder
                stream_blocks(list(stack.block), stack.final_layer_norm, ring)
            try:
                # One at a time: the embedding of a prompt must not depend on what it is encoded with.
                self._embeddings |= {prompt: encode_prompts(encoder, [prompt])[0] for prompt in missing}
            finally:
                if ring is not None:
                    ring.close()
        self._encoder = None

    def __getitem__(self, prompt: str) -> Tensor:
        """[n, D] of a prepared prompt."""
        return self._embeddings[prompt]


def facts(
    paths: Mapping[str, Path],
    adapters: Mapping[str, Path],
    hashes: Mapping[Path, str],
    loras: Sequence[LoRASpec],
) -> dict[str, str]:
    """What a written video says of the files it was made with."""
    return {
        "dit": ", ".join(f"{name} {path}" for name, path in paths.items()),
        "adapter": ", ".join(f"{name} {path}" for name, path in adapters.items()) or "none",
        "adapter_sha256": ", ".join(f"{name} {hashes[path]}" for name, path in adapters.items()) or "none",
        "loras": ", ".join(
            f"{lora.path}:{lora.strength:g}:{lora.side or 'both'} {hashes[lora.path]}" for lora in loras
        )
        or "none",
    }
