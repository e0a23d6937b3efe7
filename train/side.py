"""One model of a job: its adapter, its engine, its objective and its curves.

A job trains one model, or both noise experts of A14B, each as a `Side` of its own; a step goes to one of
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from ..moe_lora import WanmoeError, save_adapter
from ..moe_lora.block_store import BlockStore
from ..moe_lora.ring import BlockRing
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weights import save_dit
from .config import TrainerConfig
from .data.batch import Batch, Fault, LabelGates
from .data.shards import ShardDataset, ShardIndex
from .engine import lr_factor, make_engine, set_lr, uses_bf16
from .meter import Meter
from .model import load_model, open_shards, ready_adapter, resolved, side_of, side_range
from .noise import sample_generator, share_above
from .objective import Inputs, Objective
from .optimizer_state import gather_state, restore_state, set_masters
from .parking import Parked
from .routed import Routed, RoutedDiT
from .stages import STAGES, part_of, select_trainable, stage_name
from .tracking import Tracker
from .validate import HeldOut, held_out_errors, levels_within
from .watch import Watch, main_experts
from .zero import Plan

Say = Callable[[str], object]


class Side:
    """A model with its adapter on one rank, made in three steps: loaded here, given its data by `prepare`,
    and its engine by `start`.

    Args:
        config: of this model (`model.side_configs`).
        name: "high", "low" or "both".
        alone: whether it is the only model of the job.
        hashes: of the files that it starts from (`model.file_hashes`).
        store: where the blocks of its base go, if they stream or are quantised.
    """

    def __init__(
        self,
        config: TrainerConfig,
        name: str,
        plan: Plan,
        device: torch.device,
        hashes: Mapping[str, str],
        *,
        alone: bool,
        say: Say,
        store: BlockStore | None = None,
    ) -> None:
        self.name, self.plan, self.device, self.hashes = name, plan, device, dict(hashes)
        self.prefix = "" if alone else f"{name}/"
        """Before the names of its figures and of its tensors in a resume state."""
        self.label = "" if alone else f" [{name}]"
        self.say = say
        self.spec = STAGES[stage_name(config)]
        self.dtype = torch.bfloat16 if uses_bf16(config, device) else torch.float32
        dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else None
        self.shards = open_shards(config, dtype, device, say) if plan.stage == 3 else None
        # A whole copy goes straight to the card: the ranks of a node would hold one each on the host.
        place = "cpu" if plan.park or plan.stage == 3 else device
        self.store = store
        self.dit, self.adapter = load_model(config, dtype, self.shards, place, store)
        self.dit.checkpointing = config.train.checkpointing
        if self.adapter is not None:
            ready_adapter(config, self.spec, self.adapter)
            config = resolved(config, self.adapter)
        self.config = config
        self.t_range = side_range(config, self.spec, self.dit.config.boundary)
        self.trainable = select_trainable(self.spec, self.dit, self.adapter)
        # Before the engine shards them: what does not train in this stage goes into the file as it is.
        parameters = {} if self.adapter is None else self.adapter.parameters()
        self.frozen = {
            n: p.detach().to("cpu", torch.float32, copy=True)
            for n, p in parameters.items()
            if n not in self.trainable
        }
        self.step = 0
        """Steps that this side has had."""
        self.steps = 0
        """Steps that it will have had at the end."""
        self.updates = 0
        """Steps that changed something: those that were skipped do not count for the optimizer."""
        self.grad_norm = math.nan
        """Of the last update, whole, before it was clipped."""
        self.engine: Any = None
        self.watch: Watch
        self.pace = Pace()
        self.parked: Parked | None = None

    # ------------------------------------------------------------------------------------------ to its start

    def prepare(
        self,
        shards: ShardIndex,
        gates: LabelGates,
        held_out: ShardDataset,
        *,
        steps: int,
        global_batch: int,
        caption_dropout: float,
    ) -> None:
        """Gives the side its objective; raises WanmoeError where the clips lack what its terms need."""
        self.gates, self.held_out, self.steps = gates, held_out, steps
        epoch = math.ceil(len(shards) / global_batch) + 2
        # A shorter run may not have met every expert twice.
        self.deadline = max(epoch, 4) - 1
        self.objective = Objective(
            self.config,
            self.spec,
            self.adapter,
            shards,
            gates,
            t_range=self.t_range,
            global_batch=global_batch,
            steps=steps,
            caption_dropout=caption_dropout,
            device=self.device,
        )
        names = [] if self.adapter is None else self.adapter.experts.names
        self.meter = Meter(names, self.dit.config.boundary, self.device)

    def start(self, state: Mapping[str, Tensor] | None, step: int, updates: int) -> None:
        """Makes the engine, at `step` steps of this side, of which `updates` were not skipped, with their
        masters and moments, or afresh."""
        own = None if state is None else self.own_part(state)
        if own is not None:
            for name, parameter in self.trainable.items():
                parameter.data.copy_(own[f"param/{name}"])
        masters = {name: p.detach().float().clone() for name, p in self.trainable.items()}
        overlap = "orthogonality" in self.objective.weights
        module = RoutedDiT(self.dit, self.adapter, self.spec, overlap=overlap)
        self.engine = make_engine(
            self.config,
            module,
            self.trainable,
            self.spec,
            stage=self.plan.stage,
            device=self.device,
            shards=self.shards,
        )
        if own is None:
            set_masters(self.engine, self.trainable, masters)
        else:
            restore_state(self.engine, self.trainable, own, updates)
        self.step, self.updates = step, updates
        self.unseen_gradients = set(self.trainable) if state is None else set()
        if self.plan.park:
            self.parked = Parked(self.dit)
            self.leave()

    def stream(self, ring: BlockRing) -> None:
        """Takes the blocks of the base from the store when their turn comes; a collective."""
        if self.store is not None:
            self.dit.streamed = ring.add(self.store, list(self.dit.blocks), self.dit.first_adapted)

    def observe(self, tracker: Tracker | None, best: Mapping[str, Any] | None) -> None:
        """Gives it its curves; `best` is what its watch said when an earlier attempt was saved."""
        experts = [] if self.adapter is None else self.adapter.experts.names
        keys = enumerate(self.held_out.keys)
        owners = main_experts([self.gates(key, self.held_out.instruments(i)) for i, key in keys])
        self.watch = Watch(
            self.config.train, self.spec, experts, owners, tracker, self.say, best, side=self.prefix
        )

    def own_part(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its tensors of a resume state, under the names that they have without the side."""
        own = self.prefix
        return {name[len(own) :]: value for name, value in state.items() if name.startswith(own)}

    @property
    def count(self) -> int:
        """Parameters that train."""
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in self.trainable.values())

    @property
    def tags(self) -> dict[str, str]:
        """What tells its result from others."""
        facts = {"stage": stage_name(self.config), "noise_expert": self.config.model.noise_expert}
        return facts | {"base_sha256": self.hashes["base_sha256"]}

    def describe(self) -> str:
        """What trains, on what, for the first lines of a run."""
        rate, blocks = self.config.optimizer.lr or self.spec.lr, len(self.dit.blocks)
        first = self.dit.first_adapted
        prefix = f"prefix {first} of {blocks} blocks without a graph"
        if not self.dit.prefix_frozen:
            first, prefix = 0, f"all {blocks} blocks train"
        if self.dit.checkpointing:
            prefix += f", blocks {first} to {blocks - 1} computed again in the backward"
        parts = ", ".join(self.spec.trains) or "all"
        if self.adapter is not None and self.spec.routing in ("labels", "router"):
            parts += f"; time gate {self.adapter.router_config.loudness}"
        return (
            f"{self.count:,} trainable parameters ({parts}), {prefix}, t in {list(self.t_range)}, "
            f"{self.steps} steps at rate {rate:g} of {self.objective.describe()}"
        )

    def describe_loading(self) -> str | None:
        """What its ranks read of the base; a collective. None where the base was loaded whole."""
        if self.store is not None and self.store.errors:
            return f"base{self.label} {self.store.describe_error()}"
        loaded = None if self.shards is None else self.shards.loaded
        if loaded is None:
            return None
        figures = torch.tensor([loaded.seconds, loaded.bytes_read, loaded.peak], dtype=torch.float64)
        most = figures.to(self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        seconds, read, peak = most.tolist()
        return (
            f"base{self.label} read in shards: {read / 1e6:.4g} of {loaded.bytes_whole / 1e6:.4g} MB a rank "
            f"in {seconds:.2f} s, host memory {peak / 1e6:+.4g} MB at most"
        )

    # --------------------------------------------------------------------------------------------- one step

    def enter(self) -> None:
        """Before its steps and validations: where the models take turns on one card, this one comes."""
        if self.parked is not None:
            self.parked.enter(self.device)

    def leave(self) -> None:
        """Before those of the other side: this one goes."""
        if self.parked is not None:
            self.parked.leave()

    def begin(self) -> float:
        """Readies the engine for a step; returns the learning rate."""
        self.engine.train()
        return set_lr(self.engine, lr_factor(self.step, self.steps, self.config, self.spec))

    def seed_dropout(self, batch: Batch) -> None:
        """Dropout, too, is a function of the position in the sample order."""
        stream = sample_generator(self.config.train.seed, batch.positions[0], "dropout")
        torch.manual_seed(stream.initial_seed())

    def predict(self, inputs: Inputs) -> Routed:
        """One forward through the engine."""
        routed: Routed = self.engine(*inputs)
        return routed

    def drop_gradients(self) -> None:
        """Forgets what the forwards of this step have accumulated."""
        if self.plan.stage == 0:
            self.engine.zero_grad()
            return
        self.engine.optimizer.zero_grad()
        # ZeRO-1 and 2 keep the sums of earlier forwards beside the gradients, and add them to the next ones.
        for sums in ("averaged_gradients", "all_grad_tensors"):
            kept = getattr(self.engine.optimizer, sums, {})
            kept.update(dict.fromkeys(kept))

    def update(self) -> bool:
        """The optimizer's step; False, and nothing has changed, where a gradient is not finite."""
        if self.plan.stage == 0:
            # Without ZeRO the engine looks at no norm; the gradients are those of all ranks by now.
            gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
            self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(self.grad_norm):
                self.engine.zero_grad()
                return False
        self.engine.step()
        if not self.engine.was_step_applied():
            return False
        self.updates += 1
        if self.plan.stage > 0:
            self.grad_norm = float(self.engine.get_global_grad_norm())
        return True

    def check_gradients(self) -> None:
        """Every parameter of the stage must have had a non-zero gradient by the end of the first epoch.

        Not at once: a down projection has none before its up projection has moved, and experts have none
        before one of their clips came by at a noise level of their band.
        """
        if not self.unseen_gradients:
            return
        for name in sorted(self.unseen_gradients):
            gradient = safe_get_full_grad(self.trainable[name])
            if gradient is not None and bool(gradient.any()):
                self.unseen_gradients.discard(name)
        dead = sorted(self.unseen_gradients)
        if self.step == self.deadline and dead and self.step >= 3:
            raise WanmoeError(
                f"{len(dead)} of {len(self.trainable)} parameters have had no gradient in {self.step + 1} "
                f"steps, e.g. {dead[0]}; is objective.t_range within router.bands, has every expert clips?"
            )
        if self.step >= self.deadline:
            self.unseen_gradients.clear()

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the gradient of each part that trains, before it is clipped; a collective."""
        squares: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                part, square = part_of(name), gradient.float().square().sum()
                squares[part] = squares.get(part, torch.zeros_like(square)) + square
        return {f"train/grad_norm/{part}": float(square.sqrt()) for part, square in squares.items()}

    # ------------------------------------------------------------------------------------------- around steps

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels of its validation."""
        return levels_within(side_of(self.config.model.noise_expert, self.dit.config.boundary))

    def validate(self, faults: list[Fault], beat: Callable[[], None]) -> HeldOut:
        """Errors of the held-out clips at its noise levels; a collective. `beat` goes with each forward."""
        self.engine.eval()
        moved: tuple[Batch, Inputs] | None = None  # a batch comes once for every level

        def predict(x_t: Tensor, t: Tensor, batch: Batch) -> Routed:
            nonlocal moved
            if moved is None or moved[0] is not batch:
                moved = batch, self.objective.as_it_is(batch, self.dtype)
            beat()
            return self.predict(moved[1]._replace(x_t=x_t, t=t))

        return held_out_errors(
            predict,
            self.held_out,
            self.gates,
            levels=self.levels,
            batch=self.config.data.val_batch or self.config.data.batch,
            device=self.device,
            faults=faults,
            shared_by=self.config.train.sequence_parallel,
        )

    def state(self) -> dict[str, Tensor]:
        """Its part of a resume state; a collective that gathers what trains and nothing frozen."""
        return {
            self.prefix + name: value for name, value in gather_state(self.engine, self.trainable).items()
        }

    def write(self, path: Path, state: Mapping[str, Tensor], step: int) -> None:
        """Writes its result file out of a resume state of the job; step is its own."""
        own = self.own_part(state)
        trained = {name: own[f"param/{name}"] for name in self.trainable}
        if self.adapter is None:
            whole = WanDiT(self.dit.config)
            whole.load_state_dict(trained, assign=True)
            save_dit(whole, path)
            return
        save_adapter(
            self.adapter,
            path,
            stage=stage_name(self.config),
            step=step,
            noise_expert=self.config.model.noise_expert,
            base_sha256=self.hashes["base_sha256"],
            tensors={**self.frozen, **trained},
        )

    def output(self, run: Path) -> Path:
        """The result file in a run folder."""
        suffix = "" if self.name == "both" else f"-{self.name}"
        return run / f"{'model' if self.adapter is None else 'adapter'}{suffix}.safetensors"


class Pace:
    """How fast the steps of a model have been since the last line about them; validating and saving is not
    theirs."""

    steps, seconds, waited = 0, 0.0, 0.0

    def add(self, seconds: float, waited: float) -> None:
        """One more step, of which so many seconds went by in waiting for data."""
        self.steps += 1
        self.seconds += seconds
        self.waited += waited

    def take(self) -> dict[str, float]:
        """The figures, which begin anew."""
        told = {"train/steps_per_s": self.steps / max(self.seconds, 1e-9), "data/wait_s": self.waited}
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        return told


def order_of_sides(sides: Sequence[Side], steps: int) -> list[int]:
    """Which side each step of a run goes to, as an index; a function of the seed alone.

    The high-noise side has its share of the steps, `objective.high_share` or what t would be above the
    boundary.
    """
    if len(sides) == 1:
        return [0] * steps
    config = sides[0].config
    t_range = config.objective.t_range or sides[0].spec.t_range
    boundary = sides[0].dit.config.boundary
    share = config.objective.high_share or share_above(boundary, config.objective, t_range)
    high = next(index for index, side in enumerate(sides) if side.name == "high")
    stream = sample_generator(config.train.seed, 0, "side")
    drawn = torch.rand(steps, generator=stream, dtype=torch.float64)
    return [high if value < share else 1 - high for value in drawn.tolist()]


def check_alike(sides: Sequence[Side]) -> None:
    """Raises WanmoeError unless one loader can feed them all: the same shards and labels."""
    first, *others = sides
    for side in others:
        for key in ("adapter", "router"):
            if getattr(first.config, key) != getattr(side.config, key):
                raise WanmoeError(
                    f"the adapters of the {first.name}- and the {side.name}-noise model differ in their "
                    f"{key} settings; train them in jobs of their own (model.noise_expert)"
                )
        if side.dit.config != first.dit.config:
            raise WanmoeError("model.dit and model.dit_high_noise are of different sizes or tasks")
