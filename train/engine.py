"""From a config to a DeepSpeed engine: the module that it shards, its settings, and what they are derived
from.

Letters: B clips, C latent channels, F, H, W latent frames, height, width, E experts, D text width.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..moe_lora import Adapter, WanmoeError
from ..moe_lora.adapter import make_router
from ..moe_lora.routing import LearnedRouter, learned_gates
from .stages import StageSpec, part_of

if TYPE_CHECKING:
    from ..moe_lora.wan.dit import WanDiT
    from .config import TrainerConfig

# Below this a NaN on one rank poisons bf16 ZeRO-3, and below 0.19.3 checkpointing fails with frozen
# parameters.
DEEPSPEED_FLOOR = (0, 19, 8)
# One bucket of at most this many gradient elements: DeepSpeed's default of 5e8 allocates 2 GB for any model.
MAX_BUCKET = 200_000_000
# Per-parameter state of AdamW beside its step count.
MOMENTS = ("exp_avg", "exp_avg_sq")

Result = TypeVar("Result")


class Routed(NamedTuple):
    """What one forward gives; gates are those before band and alpha, zero where there are no experts."""

    v: Tensor
    """[B, C, F, H, W]"""
    probs: Tensor
    """[B, E]: what the router says, or the labels."""
    kept: Tensor
    """[B, E]: what the model got of it."""
    prompt_probs: Tensor | None
    """[K, E]: what the router says of text-only prompts."""
    overlap: Tensor | None
    """How far the experts' down projections lie in the space of the base's, 0 to 1."""


class RoutedDiT(nn.Module):
    """The DiT, and router and time gate where they are learned, as the one module that an engine owns.

    Gates are made inside the forward from its arguments, so that ZeRO-3 gathers the router like any layer and
    no module holds state between calls.

    Args:
        overlap: also measure the overlap of experts and base, for a loss on it.
    """

    def __init__(self, dit: WanDiT, adapter: Adapter | None, spec: StageSpec, overlap: bool = False) -> None:
        super().__init__()
        self.dit = dit
        self.router = None if adapter is None else adapter.router
        self.time_gate = None if adapter is None else adapter.time_gate
        self.adapter = adapter
        self.spec = spec
        self.overlap = overlap

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: list[Tensor],
        pooled: Tensor,
        rule: Tensor,
        image_latent: Tensor | None = None,
        noise: Tensor | None = None,
        evidence: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> Routed:
        """x [B, C, F, H, W] at t [B]; context: text of each clip; pooled [B, D]: its mean, which a learned
        router reads; rule [B, E]: gates by label; noise [B, E] on the logits of a learned router; evidence
        [B, K]: logits of a classifier of the first frame, where the router reads it; prompts [N, D]: pooled
        text that the router is asked about too, without a clip.
        """
        probs, of_prompts = self.expert_gates(pooled, rule, noise, evidence, prompts)
        if self.adapter is None or self.spec.routing == "frozen":
            return Routed(self.dit(x, t, context, None, image_latent), probs, probs, of_prompts, None)
        # Labels and mixes are exact; only what a network says is cut to its strongest experts.
        learned = self.spec.routing == "router" and self.router is not None
        kept = learned_gates(probs, self.adapter.router_config, self.training) if learned else probs
        # The base alone is the base alone, whatever floor the experts have.
        loud = 0.0 if self.spec.routing == "base" else 1.0
        gates = self.adapter.gates(kept, t, tokens=self.tokens(x), alpha_expert=loud)
        v = self.dit(x, t, context, gates, image_latent)
        overlap = self.adapter.overlap() if self.overlap and self.training else None
        return Routed(v, probs, kept, of_prompts, overlap)

    def expert_gates(
        self,
        pooled: Tensor,
        rule: Tensor,
        noise: Tensor | None = None,
        evidence: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, E] by label, by the learned router, or all zero where the stage has no experts yet; and [N, E]
        of the prompts."""
        if self.spec.routing != "router" or self.router is None:
            return rule if self.spec.routing == "labels" else torch.zeros_like(rule), None
        probs: Tensor
        if prompts is None:
            probs = self.router(pooled, noise, evidence)
            return probs, None
        # One call for both: a module runs once a forward, as the hooks of ZeRO-3 like it.
        clips, extra = len(pooled), len(prompts)
        read = torch.cat([pooled, prompts.to(pooled)])
        noise = None if noise is None else torch.cat([noise, noise.new_zeros(extra, noise.shape[1])])
        if evidence is not None:
            evidence = torch.cat([evidence, evidence.new_zeros(extra, evidence.shape[1])])
        probs = self.router(read, noise, evidence)
        return probs[:clips], probs[clips:]

    def tokens(self, x: Tensor) -> int:
        """Tokens of one clip."""
        p, q, r = self.dit.config.patch_size
        return (x.shape[2] // p) * (x.shape[3] // q) * (x.shape[4] // r)


def whole_router(adapter: Adapter | None) -> LearnedRouter | None:
    """A copy of the learned router outside of the engine, whole on every rank; a collective under ZeRO-3."""
    if adapter is None or adapter.router is None:
        return None
    import deepspeed

    live = adapter.router
    with torch.device("meta"):
        copy = make_router(adapter.router_config, adapter.dit.config.text_dim, len(adapter.experts))
    with deepspeed.zero.GatheredParameters(list(live.parameters())):
        whole = {name: value.detach().clone() for name, value in live.named_parameters()}
    copy.load_state_dict(whole, assign=True)
    return copy.requires_grad_(False)


def check_versions() -> None:
    """Refuses a DeepSpeed below the floor, with the command that mends it."""
    found = importlib.metadata.version("deepspeed")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:3]) < DEEPSPEED_FLOOR:
        floor = ".".join(map(str, DEEPSPEED_FLOOR))
        raise WanmoeError(f"deepspeed {found} is too old; run: pip install 'deepspeed>={floor}'")


def init_distributed(
    backend: str | None = None, timeout: datetime.timedelta = datetime.timedelta(minutes=30)
) -> tuple[int, int, torch.device]:
    """(rank, world size, device) after joining the process group that the launcher described.

    Args:
        backend: "gloo" where only a few names go between the ranks; default: nccl on GPUs.
    """
    import deepspeed

    # DeepSpeed 0.19 calls collectives under names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", r".*_tensor` is deprecated", FutureWarning)
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise WanmoeError(
            f"{', '.join(missing)} not set: start with `wanmoe train` or the deepspeed launcher"
        )
    gpus = torch.cuda.is_available()
    backend = backend or ("nccl" if gpus else "gloo")
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    if backend == "gloo":
        _drop_shared_buffer(dist.get_rank())
    device = torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    return dist.get_rank(), dist.get_world_size(), device


def _drop_shared_buffer(rank: int) -> None:
    """Takes the name from the buffer of DeepSpeed's CPU collectives, which would outlive the job: 66 MB a
    rank.

    Every rank has mapped it when all have come through the initialisation; it goes with the last of them.
    """
    dist.barrier()
    port = os.environ.get("MASTER_PORT", "")
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_{rank}"):
        left.unlink(missing_ok=True)


def deepspeed_config(
    config: TrainerConfig, dit: WanDiT, trainable: Mapping[str, nn.Parameter], bf16: bool
) -> dict[str, Any]:
    """DeepSpeed's own config, derived from the model; `deepspeed.config` is merged over it."""
    block = sum(p.numel() for p in dit.blocks[0].parameters())
    total = sum(p.numel() for p in trainable.values())
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.batch,
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "steps_per_print": 10**9,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": min(MAX_BUCKET, max(total, 1)),
            # One block ahead; every adapter tensor stays resident, the base is sharded.
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": max(3 * block, 1_000_000),
            "stage3_param_persistence_threshold": _largest_adapter_tensor(dit),
        },
    }
    merged = _merge(derived, config.deepspeed.config)
    stage = merged["zero_optimization"]["stage"]
    if stage != 3:
        raise WanmoeError(
            f"deepspeed.config.zero_optimization.stage = {stage}: only ZeRO stage 3 is supported"
        )
    return merged


def _largest_adapter_tensor(dit: WanDiT) -> int:
    adapter = [p.numel() for name, p in dit.named_parameters() if name.endswith(("_down", "_up"))]
    return max(adapter, default=0)


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def uses_bf16(config: TrainerConfig, device: torch.device) -> bool:
    """Whether the model computes in bf16: as configured, else on accelerators."""
    return config.train.precision == "bf16" or (config.train.precision == "auto" and device.type == "cuda")


def together(action: Callable[[], Result]) -> Result:
    """Does `action` on every rank; where it raises WanmoeError on any, all raise, and none waits."""
    result, fault = None, None
    try:
        result = action()
    except WanmoeError as error:
        fault = str(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    for rank, text in enumerate(faults):
        if text is not None:
            raise WanmoeError(text if all(one == text for one in faults) else f"on rank {rank}: {text}")
    return cast("Result", result)


def agree(what: Mapping[str, Any]) -> None:
    """Raises on every rank, naming the values, unless all ranks hold the same `what`."""
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, dict(what))
    for key in what:
        values = [rank.get(key) for rank in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            shown = ", ".join(f"rank {rank}: {str(values[rank])[:80]}" for rank in (0, other))
            raise WanmoeError(
                f"the ranks disagree on {key} ({shown}); nodes must share the run folder, the shards and "
                "the weights"
            )


def make_engine(
    config: TrainerConfig,
    module: RoutedDiT,
    trainable: Mapping[str, nn.Parameter],
    spec: StageSpec,
    device: torch.device,
) -> Any:
    """A DeepSpeed engine over `module` whose optimizer holds exactly `trainable`; the loop sets the rates."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    from ..moe_lora.wan.block import WanBlock

    check_versions()
    bf16 = uses_bf16(config, device)
    settings = deepspeed_config(config, module.dit, trainable, bf16)
    _check_resident(module, settings)
    set_z3_leaf_modules(module, [WanBlock])
    groups: list[dict[str, Any]] = []
    for part, peak in peak_rates(config, spec).items():
        parameters = [p for name, p in trainable.items() if part_of(name) == part]
        if parameters:
            groups.append({"params": parameters, "lr": 0.0, "peak_lr": peak})
            if part == "time_gate":  # zero is no place for a center or the logarithm of a slope
                groups[-1]["weight_decay"] = 0.0
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    allocate_moments(engine, 0)
    return engine


def _check_resident(module: RoutedDiT, settings: Mapping[str, Any]) -> None:
    """The overlap reads parameters outside of their own modules: they must not be gathered by layer."""
    zero = settings["zero_optimization"]
    needed = _largest_adapter_tensor(module.dit)
    lower = zero["stage3_param_persistence_threshold"] < needed
    if module.overlap and (lower or "stage3_model_persistence_threshold" in zero):
        raise WanmoeError(
            "objective.orthogonality needs every adapter tensor resident: under deepspeed.config leave "
            f"stage3_param_persistence_threshold at {needed} or above, and the model's threshold out"
        )


def allocate_moments(engine: Any, step: int) -> None:
    """Zero moments, as after `step` steps, for every shard that the engine updates: AdamW makes them late."""
    states = engine.optimizer.optimizer.state
    for shard in engine.optimizer.fp32_partitioned_groups_flat:
        moments = {key: torch.zeros_like(shard) for key in MOMENTS}
        states[shard] = {"step": torch.tensor(float(step)), **moments}


def peak_rates(config: TrainerConfig, spec: StageSpec) -> dict[str, float]:
    """Peak learning rate of each part that a stage trains; the first is the one that a log line tells."""
    asked = config.optimizer
    lr = asked.lr or spec.lr
    joint = len(spec.trains) > 1
    rates = {
        "model": lr,
        "experts": lr,
        "base": (asked.base_lr or lr) if joint else lr,
        "router": (asked.router_lr or 1e-4) if joint else lr,
    }
    trained = {part: rate for part, rate in rates.items() if part in (spec.trains or ("model",))}
    return trained | ({"time_gate": asked.time_gate_lr} if "experts" in trained else {})


def lr_factor(step: int, steps: int, config: TrainerConfig, spec: StageSpec) -> float:
    """Factor on the peak learning rate at a step of `steps`: linear warm-up, then constant or cosine to
    zero."""
    warmup = config.optimizer.warmup_steps
    if warmup is None:
        warmup = min(spec.warmup, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    if (config.optimizer.schedule or spec.schedule) == "constant":
        return 1.0
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_lr(engine: Any, factor: float) -> float:
    """Sets every group to factor x its peak; returns the first group's rate."""
    groups = engine.optimizer.param_groups
    for group in groups:
        group["lr"] = factor * group["peak_lr"]
    return float(groups[0]["lr"])
