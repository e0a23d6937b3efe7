"""The LoRA mixture-of-experts on a frozen DiT: the wrapped linear, where it sits, and the registry of what
trains.

Letters: B clips, G gate rows, E experts, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from ..kernels.lora_moe import LoRAMoEWeights, lora_moe_linears
from .errors import WanmoeError
from .instruments import SURGICAL, Expert, ExpertSet
from .routing import Gates, LearnedRouter, RouterConfig, TimeGate, at_noise_level
from .seeding import seeded_generator

if TYPE_CHECKING:
    from .wan.dit import WanDiT

Part = Literal["base", "experts", "router"]
PARTS: tuple[Part, ...] = ("base", "experts", "router")


class AdapterConfig(BaseModel):
    """Section `adapter`: the experts, their ranks, and the linears that carry them."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", frozen=True)

    experts: tuple[Expert, ...] = SURGICAL
    """In the order of the gate columns."""
    fallback: str | None = None
    """Expert for prompts without any keyword; none: such a prompt routes no expert."""
    rank_q: int = Field(8, ge=1)
    rank_k: int = Field(4, ge=1)
    rank_v: int = Field(4, ge=1)
    rank_o: int = Field(4, ge=1)
    rank_ffn: int = Field(4, ge=1)
    """Ranks per projection, of every expert, and of the base adapter where nothing else is said."""
    rank_base: int | None = Field(None, ge=1)
    """Rank of the base adapter in every linear that carries experts; default: as the experts there."""
    base_ranks: dict[str, int] = Field(default_factory=dict)
    """Rank of the base adapter by linear (`blocks.3.ffn.2`), where it is not that of rank_base. A linear that
    is named here alone carries the base without experts. Importing a LoRA as frozen base sets it."""
    expert_init: Literal["fresh", "base"] = "fresh"
    """How experts that were never trained start. fresh: random down projections; base: those of the base
    adapter, whose ranks must be theirs. The up projections are zero in both."""
    blocks: int | tuple[int, ...] = 8
    """How many of the last blocks are adapted, or which ones."""
    ffn_blocks: int = Field(3, ge=0)
    """In how many of the last adapted blocks the feed-forward layer is adapted too."""
    ffn_layers: tuple[Literal["ffn.0", "ffn.2"], ...] = ("ffn.0",)
    alpha: float = Field(4.0, gt=0)
    """Scale of a part is alpha / rank."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a rank is left out of a training forward; the others are scaled by 1 / (1 - p). Where
    it is not given, stage b takes 0.05."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a whole linear goes without its adapter in a training forward; scaled likewise."""

    @field_validator("blocks", mode="before")
    @classmethod
    def _last_n(cls, value: Any) -> Any:
        if isinstance(value, str) and (match := re.fullmatch(r"last_(\d+)", value)):
            return int(match[1])
        return value

    @model_validator(mode="after")
    def _usable_experts(self) -> AdapterConfig:
        try:
            ExpertSet(self.experts, self.fallback)
        except WanmoeError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def expert_set(self) -> ExpertSet:
        return ExpertSet(self.experts, self.fallback)

    def block_indices(self, num_layers: int) -> list[int]:
        """Indices of the adapted blocks in a model of num_layers, in order."""
        chosen = range(num_layers - self.blocks, num_layers) if isinstance(self.blocks, int) else self.blocks
        indices = sorted(set(chosen))
        if not indices or indices[0] < 0 or indices[-1] >= num_layers:
            raise WanmoeError(f"adapter.blocks = {self.blocks} does not fit a model of {num_layers} blocks")
        return indices

    def ranks(self, num_layers: int) -> dict[str, int]:
        """Rank of an expert per linear that carries experts, by its name in the model, in module order."""
        indices = self.block_indices(num_layers)
        ffn = set(indices[len(indices) - min(self.ffn_blocks, len(indices)) :])
        by_projection = {"q": self.rank_q, "k": self.rank_k, "v": self.rank_v, "o": self.rank_o}
        ranks: dict[str, int] = {}
        for index in indices:
            for attention in ("self_attn", "cross_attn"):
                for projection, rank in by_projection.items():
                    ranks[f"blocks.{index}.{attention}.{projection}"] = rank
            for layer in self.ffn_layers if index in ffn else ():
                ranks[f"blocks.{index}.{layer}"] = self.rank_ffn
        return ranks

    def linears(self, num_layers: int) -> dict[str, tuple[int, int | None]]:
        """(rank of the base, rank of an expert or None without experts) per adapted linear, by its name."""
        ranks = self.ranks(num_layers)
        linears: dict[str, tuple[int, int | None]] = {
            name: (self.base_ranks.get(name, self.rank_base or rank), rank) for name, rank in ranks.items()
        }
        alone = {name: (rank, None) for name, rank in self.base_ranks.items() if name not in ranks}
        return linears | alone

    def check_base_trains(self, num_layers: int) -> None:
        """Raises WanmoeError where the base adapter reaches further than the experts, as that of an imported
        LoRA does: blocks before the first expert run without a graph."""
        alone = [name for name, (_, rank) in self.linears(num_layers).items() if rank is None]
        if alone:
            raise WanmoeError(
                f"the base adapter is also in {len(alone)} linears without experts, {alone[0]} for one, "
                "and cannot train there; train experts on it, with train.stage = 'b' and "
                "train.freeze_base = true"
            )


class LoRAMoELinear(nn.Module):
    """A frozen linear that carries a base LoRA and E expert LoRAs, packed (layout `wanmoe/1`).

    It takes over weight and bias of the linear it replaces, so that checkpoint names stay as they were and
    the op reads only parameters of its own module, as the hooks of ZeRO-3 need. Without a rank for experts it
    carries the base alone.
    """

    expert_down: Tensor
    expert_up: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        base_rank: int,
        rank: int | None,
        experts: int,
        config: AdapterConfig,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        d_out, d_in = linear.weight.shape
        self.experts = 0 if rank is None else experts
        rank = rank or 1
        self.scale_base, self.scale_expert = config.alpha / base_rank, config.alpha / rank
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        kind: dict[str, Any] = {"device": device or linear.weight.device, "dtype": torch.float32}
        self.base_down = nn.Parameter(torch.empty(base_rank, d_in, **kind))
        self.base_up = nn.Parameter(torch.zeros(d_out, base_rank, **kind))
        expert_down = torch.empty(self.experts, rank, d_in, **kind)
        expert_up = torch.zeros(self.experts, d_out, rank, **kind)
        if self.experts:
            self.expert_down, self.expert_up = nn.Parameter(expert_down), nn.Parameter(expert_up)
        else:  # nothing to train, to save or to partition
            self.register_buffer("expert_down", expert_down, persistent=False)
            self.register_buffer("expert_up", expert_up, persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """Down projections uniform in +-1/sqrt(d_in) (kaiming with a = sqrt(5)), up projections zero."""
        for down in (self.base_down, self.expert_down):
            bound = 1 / math.sqrt(down.shape[-1])
            values = torch.empty(down.shape).uniform_(-bound, bound, generator=generator)
            down.data.copy_(values)
        self.base_up.data.zero_()
        self.expert_up.data.zero_()

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        """[..., d_in] -> [..., d_out]; without gates the frozen linear alone."""
        if gates is None:
            return F.linear(x, self.weight, self.bias)
        experts = gates.experts[:, : self.experts]
        return lora_moe_linears(x, [self.adapted()], gates.base, experts, gates.tokens_per_row)[0]

    def delta(self, base: float, experts: Sequence[float]) -> Tensor:
        """What the adapter adds to the weight under constant gates, [d_out, d_in] wide."""
        delta = self.scale_base * base * (self.base_up @ self.base_down)
        for gate, down, up in zip(experts, self.expert_down, self.expert_up, strict=False):
            if gate:
                delta.addmm_(up, down, alpha=self.scale_expert * gate)
        return delta.detach()

    def adapted(self) -> LoRAMoEWeights:
        """The linear as the op takes it, ranks dropped where that is configured."""
        base_up, expert_up = self._drop(self.base_up, self.expert_up)
        return LoRAMoEWeights(
            self.weight,
            self.bias,
            self.base_down,
            base_up,
            self.expert_down,
            expert_up,
            self.scale_base,
            self.scale_expert,
        )

    def _drop(self, *ups: Tensor) -> tuple[Tensor, ...]:
        """Dropped ranks are dropped columns of the up projections: no extra pass over the tokens."""
        if not self.training or not (self.rank_dropout or self.module_dropout):
            return ups
        whole = F.dropout(torch.ones((), device=ups[0].device), self.module_dropout)
        return tuple(up * F.dropout(torch.ones_like(up[..., :1, :]), self.rank_dropout) * whole for up in ups)


class Adapter:
    """What was attached to a DiT: the one registry that stages, the optimiser, saving and counting use."""

    def __init__(
        self,
        dit: WanDiT,
        config: AdapterConfig,
        router_config: RouterConfig,
        modules: dict[str, LoRAMoELinear],
        router: LearnedRouter | None,
        time_gate: TimeGate | None = None,
    ) -> None:
        self.dit = dit
        self.config = config
        self.router_config = router_config
        self.experts = config.expert_set
        self.modules = modules
        self.router = router
        self.time_gate = time_gate

    def parameters(self, parts: Iterable[Part] = PARTS) -> dict[str, nn.Parameter]:
        """Adapter parameters of the given parts by their name in the adapter file.

        A learned time gate is one of the experts' parameters: how loud they are, whoever routes.
        """
        parts = set(parts)
        found: dict[str, nn.Parameter] = {}
        for name, module in self.modules.items():
            if "base" in parts:
                found[f"{name}.base_down"], found[f"{name}.base_up"] = module.base_down, module.base_up
            if "experts" in parts and module.experts:
                found.update(
                    (f"{name}.{leaf}", module.get_parameter(leaf)) for leaf in ("expert_down", "expert_up")
                )
        if "experts" in parts and self.time_gate is not None:
            found.update({f"router.time_{name}": value for name, value in self.time_gate.named_parameters()})
        if "router" in parts and self.router is not None:
            found.update({f"router.{name}": value for name, value in self.router.named_parameters()})
        return found

    def count(self, parts: Iterable[Part] = PARTS) -> int:
        """Number of parameters in the given parts."""
        return sum(_numel(parameter) for parameter in self.parameters(parts).values())

    def overlap(self) -> Tensor:
        """How far the experts' down projections lie in the space of the base's: mean over the linears of
        |D_e D_b^T|^2 / (|D_e|^2 |D_b|^2) by Frobenius norms, 0 where they are orthogonal. Differentiable."""
        shares = []
        for linear in self.modules.values():
            if linear.experts:
                base, experts = linear.base_down.float(), linear.expert_down.float().flatten(0, 1)
                size = base.square().sum() * experts.square().sum()
                shares.append((experts @ base.T).square().sum() / size.clamp_min(1e-30))
        return torch.stack(shares).mean()

    def train_only(self, parts: Iterable[Part]) -> dict[str, nn.Parameter]:
        """Freezes the whole model and the adapter but for the given parts; returns those by name."""
        self.dit.requires_grad_(False)
        for parameter in self.parameters().values():
            parameter.requires_grad_(False)
        chosen = self.parameters(parts)
        # A frozen base before the first expert runs without a graph too.
        trains_base = any(name.endswith("base_down") for name in chosen)
        first = _first_block(name for name, module in self.modules.items() if trains_base or module.experts)
        self.dit.freeze_prefix(first, adapted=first > _first_block(self.modules))
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return chosen

    def gates(
        self,
        experts: Tensor,
        t: Tensor,
        *,
        tokens: int,
        alpha_base: float = 1.0,
        alpha_expert: float = 1.0,
    ) -> Gates:
        """Router output -> Gates of a forward: `at_noise_level` x alpha_expert on the experts, alpha_base on
        the base.

        Args:
            experts: [B, E] per clip or [B, F, E] per latent frame.
            t: [B] noise level of each clip.
            tokens: tokens of one clip; must divide by F for gates per frame.
        """
        frames = experts.shape[1] if experts.dim() == 3 else 1
        if tokens % frames:
            raise ValueError(f"{tokens} tokens of a clip do not divide among {frames} gate frames")
        rows = experts.reshape(t.shape[0] * frames, -1)
        levels = t.repeat_interleave(frames)
        rows = at_noise_level(rows, levels, self.router_config, self.time_gate) * alpha_expert
        base = torch.full((rows.shape[0],), alpha_base, device=rows.device, dtype=rows.dtype)
        return Gates(rows, base, tokens // frames)


def attach(
    dit: WanDiT,
    config: AdapterConfig | None = None,
    router: RouterConfig | None = None,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Adapter:
    """Puts a fresh adapter on a DiT, in place, and freezes everything else; up projections are zero.

    With gates the model is then bit-equal to the frozen one. Initial values depend on the seed and the name
    of the linear alone, so every rank gets the same. The adapter lies beside the linears, or on `device`; on
    the meta device nothing is initialised.

    Raises:
        WanmoeError: the model has an adapter already, the configured blocks do not exist, or max_gate is too
            low for so many experts.
    """
    config, router_config = config or AdapterConfig(), router or RouterConfig()
    experts = config.expert_set
    router_config.check(len(experts))
    linears = config.linears(len(dit.blocks))
    if any(isinstance(module, LoRAMoELinear) for module in dit.modules()):
        raise WanmoeError("this model has an adapter already; load the base again before attaching another")
    dit.requires_grad_(False)
    modules: dict[str, LoRAMoELinear] = {}
    for name, (base_rank, rank) in linears.items():
        parent_name, _, child = name.rpartition(".")
        try:
            parent = dit.get_submodule(parent_name)
            plain = parent.get_submodule(child)
        except AttributeError as error:
            raise WanmoeError(
                f"adapter.base_ranks: this model of {len(dit.blocks)} blocks has no {name}"
            ) from error
        linear = LoRAMoELinear(plain, base_rank, rank, len(experts), config, device)  # type: ignore[arg-type]
        if not linear.base_down.is_meta:
            linear.reset(seeded_generator(seed, name))
        setattr(parent, child, linear)
        modules[name] = linear
    dit.freeze_prefix(_first_block(modules))
    place = next(iter(modules.values())).base_down.device
    learned = None
    if router_config.mode == "learned":
        learned = make_router(router_config, dit.config.text_dim, len(experts)).to(place)
        _reset_router(learned, seed)
    time_gate = TimeGate(len(experts)).to(place) if router_config.time_gate == "learned" else None
    return Adapter(dit, config, router_config, modules, learned, time_gate)


def make_router(config: RouterConfig, text_dim: int, experts: int) -> LearnedRouter:
    """The network of a learned router as its config describes it, with torch's own random weights."""
    return LearnedRouter(text_dim, experts, config.hidden_dim, config.temperature, config.first_frame_classes)


def start_experts_from_base(adapter: Adapter) -> bool:
    """Copies the base's down projections into those of every expert, for `expert_init` = "base".

    The experts' up projections stay zero, so the model's function stays as it is. Experts of which any was
    trained are left alone; returns whether it copied. Call it before an engine shards the parameters.

    Raises:
        WanmoeError: a linear whose base has another rank than its experts.
    """
    linears = {name: linear for name, linear in adapter.modules.items() if linear.experts}
    if any(bool(linear.expert_up.any()) for linear in linears.values()):
        return False
    for name, linear in linears.items():
        base, expert = linear.base_down.shape[0], linear.expert_down.shape[1]
        if base != expert:
            raise WanmoeError(
                f'adapter.expert_init = "base": {name} has a base of rank {base} and experts of rank '
                f'{expert}; give them one rank, or set expert_init = "fresh"'
            )
    for linear in linears.values():
        linear.expert_down.data.copy_(linear.base_down.data)
    adapter.config = adapter.config.model_copy(update={"expert_init": "base"})
    return True


def _reset_router(router: LearnedRouter, seed: int) -> None:
    for name, parameter in router.named_parameters():
        if parameter.is_meta:
            continue
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else router.hidden.in_features
        generator = seeded_generator(seed, f"router.{name}")
        values = torch.empty(parameter.shape).uniform_(-1, 1, generator=generator)
        parameter.data.copy_(values / math.sqrt(fan_in))


def _first_block(linears: Iterable[str]) -> int:
    return min(int(name.split(".")[1]) for name in linears)


def _numel(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a partitioned parameter is empty and its true size stands in ds_numel.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
