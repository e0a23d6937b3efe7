"""One run of one stage on one rank: batch, noise, gates, forward, loss, backward, guard, step, log, save."""

from __future__ import annotations

import importlib.metadata
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from tqdm import tqdm

from ..kernels.lora_moe import table
from ..moe_lora import WanmoeError, save_adapter
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weights import save_dit
from . import checkpoint, resume
from .config import TrainerConfig
from .data.batch import Batch, Fault, LabelGates, check_labels
from .data.loader import TrainBatches, open_reader
from .data.shards import ShardDataset
from .engine import (
    Routed,
    RoutedDiT,
    agree,
    init_distributed,
    lr_factor,
    make_engine,
    set_lr,
    together,
    uses_bf16,
    whole_router,
)
from .feed import Feed
from .meter import Meter
from .model import (
    check_shards_fit,
    file_hashes,
    load_model,
    local_files,
    ready_adapter,
    resolved,
    side_of,
    side_range,
)
from .noise import sample_generator
from .objective import Inputs, Loss, Objective
from .stages import STAGES, part_of, select_trainable, stage_name, total_steps
from .tracking import Tracker, flatten
from .validate import held_out_errors, levels_within
from .watch import Watch, main_experts


def train(config: TrainerConfig) -> Path:
    """Runs one stage to its end, or to a stop signal, and returns the file it wrote.

    Every rank of the launcher calls this. Raises WanmoeError for faults in config, data or weights.
    """
    rank, world, device = init_distributed()
    trainer = Trainer(config, rank, world, device)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer.output


class Trainer:
    """State of one run on one rank."""

    def __init__(self, config: TrainerConfig, rank: int, world: int, device: torch.device) -> None:
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.spec = STAGES[stage_name(config)]
        self.run = config.train.run
        # Hashing 28 GB takes a while: once, not once per rank.
        hashes: list[dict[str, str]] = [file_hashes(config) if rank == 0 else {}]
        dist.broadcast_object_list(hashes)
        self.hashes = hashes[0]
        self.dit, self.adapter = load_model(config, torch.bfloat16 if uses_bf16(config, device) else None)
        self.dit.checkpointing = config.train.checkpointing
        if self.adapter is not None:
            ready_adapter(config, self.spec, self.adapter)
            self.config = config = resolved(config, self.adapter)
        self.t_range = side_range(config, self.spec, self.dit.config.boundary)
        together(self._load_data)
        shards, global_batch = self.batches.shards, self.batches.global_batch
        self.steps = total_steps(config, self.spec, len(shards), global_batch)
        self.objective = together(self._make_objective)
        path, state, trainer = resume.find(self.run, config.train.resume, rank, self._say)
        self.step = int(trainer.get("step", 0))
        # Paths may differ between nodes; what lies there may not, as far as a quick look tells.
        paths: dict[str, Any] = {
            "model": {"dit", "adapter"},
            "data": {"shards"},
            "train": {"run"},
            "objective": resume.PLACES,
            "launch": True,
        }
        dump = flatten(config.model_dump(mode="json", exclude=paths))
        settings = {f"the config's {key}": value for key, value in dump.items()} | {
            "the tuned table of the kernels": table.digest(device),
            "the order of the samples": [self.batches.order.batch(step) for step in range(16)],
        }
        agree({"the resume state": path and path.name} | settings | local_files(config) | self._identity())
        self.trainable = select_trainable(self.spec, self.dit, self.adapter)
        self.frozen = self._frozen_adapter_parts()
        if state is not None:
            resume.check(self.run, state, trainer, self._identity(), self.trainable)
            for name, parameter in self.trainable.items():
                parameter.data.copy_(state[f"param/{name}"])
        masters = {name: p.detach().float().clone() for name, p in self.trainable.items()}
        module = RoutedDiT(
            self.dit, self.adapter, self.spec, overlap="orthogonality" in self.objective.weights
        )
        self._say(self._start_line())
        self.engine = make_engine(config, module, self.trainable, self.spec, device)
        if state is None:
            checkpoint.set_masters(self.trainable, masters)
        else:
            checkpoint.restore_state(self.engine, self.trainable, state, self.step)
            self._say(f"resuming {self.run} at step {self.step}")
        self.unseen_gradients = set() if state is not None else set(self.trainable)
        self.bad_steps = 0
        bad_samples = trainer.get("bad_samples", {})
        self.feed = Feed(self.batches, config.data.max_bad_samples, bad_samples, self._say)
        self.stop_signal: int | None = None
        self.tracker = self._tracker(trainer)
        names = [] if self.adapter is None else self.adapter.experts.names
        self.meter = Meter(names, self.dit.config.boundary, device)
        keys = enumerate(self.held_out.keys)
        owners = main_experts([self.gates(key, self.held_out.instruments(i)) for i, key in keys])
        self.watch = Watch(
            config.train, self.spec, names, owners, self.tracker, self._say, trainer.get("best")
        )

    def _load_data(self) -> None:
        config = self.config
        experts, router = (
            (self.adapter.experts, self.adapter.router_config)
            if self.adapter is not None
            else (config.adapter.expert_set, config.router)
        )
        by_label = self.spec.routing in ("labels", "router")
        self.gates = LabelGates(experts, router, needed=by_label)
        # A router learns from the captions: it must see them all.
        self.caption_dropout = 0.0 if self.spec.trains == ("router",) else config.data.caption_dropout
        dataset = open_reader(config.data, config.train.seed)
        self.held_out = ShardDataset(config.data.shards, "val")
        self.batches = TrainBatches(
            dataset,
            self.gates,
            batch=config.data.batch,
            accumulation=config.train.accumulation,
            rank=self.rank,
            world=self.world,
            seed=config.train.seed,
            balanced=config.data.balanced and by_label,
            workers=config.data.workers,
            caption_dropout=self.caption_dropout,
            max_bad=config.data.max_bad_samples,
            pin=self.device.type == "cuda",
        )
        check_shards_fit(self.dit, dataset)
        if by_label:
            unseen = check_labels(dataset, self.gates)
            check_labels(self.held_out, self.gates)
            if unseen:
                self._say(f"no training clip shows {', '.join(unseen)}: nothing is routed to these experts")

    def _make_objective(self) -> Objective:
        return Objective(
            self.config,
            self.spec,
            self.adapter,
            self.batches.shards,
            self.gates,
            t_range=self.t_range,
            global_batch=self.batches.global_batch,
            steps=self.steps,
            caption_dropout=self.caption_dropout,
            device=self.device,
        )

    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its resume; the world size may, at the same global batch."""
        # Which samples a rank streams depends on both numbers.
        streams = self.config.data.reader == "streaming"
        readers = {"readers": [self.world, self.config.data.workers]} if streams else {}
        return resume.identity(
            self.config,
            steps=self.steps,
            data=self.batches.shards.fingerprint,
            global_batch=self.batches.global_batch,
            **readers,
            **self.hashes,
        )

    def _frozen_adapter_parts(self) -> dict[str, Tensor]:
        """Copies of the adapter tensors that do not train in this stage, taken before the engine shards
        them."""
        if self.adapter is None:
            return {}
        parameters = self.adapter.parameters()
        return {n: p.detach().float().clone() for n, p in parameters.items() if n not in self.trainable}

    def _tracker(self, trainer: dict[str, Any]) -> Tracker | None:
        if self.rank != 0:
            return None
        params = flatten(resume.write_config(self.config, self.run, self.steps)) | {
            "world_size": self.world,
            "trainable": self._trainable_count(),
        }
        params |= {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
        return Tracker(self.config.tracking, self.run, params, self.step, trainer.get("mlflow_run"))

    def _trainable_count(self) -> int:
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in self.trainable.values())

    def _start_line(self) -> str:
        rate, blocks = self.config.optimizer.lr or self.spec.lr, len(self.dit.blocks)
        prefix = f"prefix {self.dit.first_adapted} of {blocks} blocks without a graph"
        if not self.dit.prefix_frozen:
            prefix = f"all {blocks} blocks train"
        parts = ", ".join(self.spec.trains) or "all"
        if self.adapter is not None and self.spec.routing in ("labels", "router"):
            parts += f"; time gate {self.adapter.router_config.loudness}"
        return (
            f"stage {self.config.train.stage}: {self._trainable_count():,} trainable parameters ({parts}), "
            f"{prefix}, {len(self.batches.shards)} clips, {len(self.held_out)} held out, global batch "
            f"{self.batches.global_batch} on {self.world} ranks ({self.device.type}), "
            f"t in {list(self.t_range)}, {self.steps} steps at rate {rate:g} of {self.objective.describe()}"
        )

    def _say(self, line: str) -> None:
        if self.rank == 0:
            tqdm.write(line, file=sys.stderr)

    def fit(self) -> None:
        """Trains to the last step or an early stop; on SIGTERM or SIGINT saves within a step and returns."""
        config = self.config.train
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self.step == 0 and self._validate():
            self._save()
        if self._complete:
            # Nothing is left to train, but a run that was killed between its last two writes lacks a file.
            self._say(f"{self.run} is complete: {self.step} steps are done")
            self._save()
        self.feed.start(self.step, self.steps)
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            disable=self.rank != 0,
            desc=f"stage {config.stage}",
            # A terminal gets a living bar, a log file a line now and then.
            mininterval=0.2 if sys.stderr.isatty() else 20,
            maxinterval=30,
        )
        began, logged_at = time.monotonic(), self.step
        stopped = False
        while not self._complete and not stopped:
            values, stopped = self.train_step()
            bar.update()
            bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)
            ended = self.step == self.steps
            if self._logs(self.step):
                values["train/steps_per_s"] = (self.step - logged_at) / max(time.monotonic() - began, 1e-9)
                self.watch.log(self.step, values | self.meter.reduce())
            validates = ended or (config.val_every and self.step % config.val_every == 0)
            best = bool(validates) and self._validate()
            if (
                self._complete
                or stopped
                or best
                or (config.save_every and self.step % config.save_every == 0)
            ):
                self._save()
            if self.step % config.log_every == 0:
                # Validation and saving are not training time.
                began, logged_at, self.feed.waited = time.monotonic(), self.step, 0.0
        bar.close()
        if self.rank == 0 and stopped:
            self._say(f"stopped by signal at step {self.step}; the same command goes on from there")

    @property
    def _complete(self) -> bool:
        return self.step >= self.steps or self.watch.ended

    def _logs(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step == self.steps

    def train_step(self) -> tuple[dict[str, float], bool]:
        """One optimizer step over `accumulation` forwards; returns its figures and whether to stop."""
        config = self.config
        self.engine.train()
        lr = set_lr(self.engine, lr_factor(self.step, self.steps, config, self.spec))
        batches: Iterator[Batch] = (self.feed.take(self.step) for _ in range(config.train.accumulation))
        if self.objective.router_terms:  # the router is asked for the whole step first
            taken = list(batches)
            self.objective.open_window(taken, whole_router(self.adapter))
            batches = iter(taken)
        seen: list[str] = []
        totals: dict[str, float] = {}
        norms: dict[str, float] = {}
        stop = skipped = False
        for micro, batch in enumerate(batches):
            seen += batch.keys
            # Dropout, too, is a function of the position in the sample order.
            torch.manual_seed(
                sample_generator(config.train.seed, batch.positions[0], "dropout").initial_seed()
            )
            last = micro + 1 == config.train.accumulation
            self.engine.set_gradient_accumulation_boundary(last)
            loss = self.objective(batch, self.step, self._dtype, self._predict)
            figures, finite, stop = self._agree(loss)
            if not finite:
                self._report_bad(batch.keys, "the loss is not finite")
                # What earlier forwards of this step have accumulated goes too, and the batches of the later
                # ones are read all the same: every rank stays on the same samples.
                self.engine.optimizer.zero_grad()
                deque(batches, maxlen=0)
                skipped = True
                break
            totals = {k: totals.get(k, 0.0) + v / config.train.accumulation for k, v in figures.items()}
            self.meter.add(loss)
            self.engine.backward(loss.total)
            self._check_gradients(last)
            if last and self._logs(self.step + 1):
                norms = self._gradient_norms()
            self.engine.step()
        self.step += 1
        if not skipped and not self.engine.was_step_applied():
            self._report_bad(seen, "the gradient is not finite")
            skipped = True
        values = {f"train/{name}": value for name, value in totals.items()} | {"train/lr": lr} | norms
        values["train/skipped_step"] = float(skipped)
        values |= {
            "data/wait_s": self.feed.waited,
            "data/bad_samples": float(len(self.feed.bad_samples)),
        }
        values.setdefault("train/loss", math.nan)
        if not skipped:
            self.bad_steps = 0
            values["train/grad_norm"] = float(self.engine.get_global_grad_norm())
        return values, stop

    def _predict(self, inputs: Inputs) -> Routed:
        routed: Routed = self.engine(*inputs)
        return routed

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.engine.bfloat16_enabled() else torch.float32

    def _agree(self, loss: Loss) -> tuple[dict[str, float], bool, bool]:
        """(mean figures over ranks, whether the loss is finite on all, whether any rank was told to stop)."""
        losses = {"loss": loss.total, **loss.terms}
        values = torch.stack([value.detach().float() for value in losses.values()])
        finite = torch.isfinite(values).all()
        flags = torch.stack([(~finite).float(), values.new_tensor(float(self.stop_signal is not None))])
        packed = torch.cat([torch.nan_to_num(values), flags])
        dist.all_reduce(packed)
        means = (packed / self.world).tolist()
        return dict(zip(losses, means, strict=False)), means[-2] == 0, means[-1] > 0

    def _report_bad(self, own_keys: list[str], cause: str) -> None:
        self.bad_steps += 1
        named = ", ".join(key for part in self.feed.gather(own_keys) for key in part)
        self._say(f"step {self.step}: {cause}; skipped on all ranks; samples: {named}")
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise WanmoeError(
                f"{self.bad_steps} steps in a row were skipped, at last because {cause} (samples: {named}); "
                "lower optimizer.lr or check the shards with `wanmoe data verify`"
            )

    def _check_gradients(self, last: bool) -> None:
        """Every parameter of the stage must have had a non-zero gradient by the end of the first epoch.

        Not at once: a down projection has none before its up projection has moved, and experts have none
        before one of their clips came by at a noise level of their band.
        """
        if not last or not self.unseen_gradients:
            return
        for name in sorted(self.unseen_gradients):
            gradient = safe_get_full_grad(self.trainable[name])
            if gradient is not None and bool(gradient.any()):
                self.unseen_gradients.discard(name)
        epoch = math.ceil(len(self.batches.shards) / self.batches.global_batch) + 2
        deadline = max(epoch, 4) - 1  # a shorter run may not have met every expert twice
        dead = sorted(self.unseen_gradients)
        if self.step == deadline and dead and self.step >= 3:
            raise WanmoeError(
                f"{len(dead)} of {len(self.trainable)} parameters have had no gradient in {self.step + 1} "
                f"steps, e.g. {dead[0]}; is objective.t_range within router.bands, has every expert clips?"
            )
        if self.step >= deadline:
            self.unseen_gradients.clear()

    def _gradient_norms(self) -> dict[str, float]:
        """Norm of the gradient of each part that trains, before it is clipped; a collective."""
        squares: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                part, square = part_of(name), gradient.float().square().sum()
                squares[part] = squares.get(part, torch.zeros_like(square)) + square
        return {f"train/grad_norm/{part}": float(square.sqrt()) for part, square in squares.items()}

    def _validate(self) -> bool:
        """Measures the held-out clips; whether this is the best so far, where early stopping asks."""
        self.engine.eval()

        moved: tuple[Batch, Inputs] | None = None  # a batch comes once for every level

        def predict(x_t: Tensor, t: Tensor, batch: Batch) -> Routed:
            nonlocal moved
            if moved is None or moved[0] is not batch:
                moved = batch, self.objective.as_it_is(batch, self._dtype)
            return self._predict(moved[1]._replace(x_t=x_t, t=t))

        levels = levels_within(side_of(self.config.model.noise_expert, self.dit.config.boundary))
        faults: list[Fault] = []
        held_out = held_out_errors(
            predict,
            self.held_out,
            self.gates,
            levels=levels,
            batch=self.config.data.val_batch or self.config.data.batch,
            device=self.device,
            faults=faults,
        )
        self.feed.report(self.step, faults)
        return self.watch.validated(self.step, held_out, levels)

    def _save(self) -> None:
        """Resume state and result file; gathers what trains, and nothing frozen."""
        state = checkpoint.gather_state(self.trainable)
        if self.rank == 0:
            self._write(state)
        dist.barrier()

    def _write(self, state: dict[str, Tensor]) -> None:
        # The result first: a run whose state says that it is finished has its file.
        if self.watch.writes(self.step):
            self._write_output(state, self.step)
            self._say(f"step {self.step}: wrote {self.output}")
        elif not self.output.exists():
            best = int(self.watch.best["step"])
            self._write_output(checkpoint.read(checkpoint.state_of(self.run / "resume", best))[0], best)
            self._say(f"step {self.step}: wrote {self.output} of step {best}, the best")
        else:
            self._say(f"step {self.step}: saved; {self.output} is that of step {self.watch.best['step']}")
        trainer = self._identity() | {"step": self.step, "world_size": self.world}
        trainer |= {"bad_samples": self.feed.bad_samples, "best": self.watch.best}
        trainer["mlflow_run"] = self.tracker.run_id if self.tracker else None
        keep, spare = self.config.train.keep, self.watch.best.get("step")
        checkpoint.commit(self.run / "resume", state, trainer, keep, spare)
        if self.tracker is not None and self._complete:
            self.tracker.artifact(self.run / "config.toml")
            self.tracker.artifact(self.output)

    def _write_output(self, state: dict[str, Tensor], step: int) -> None:
        trained = {name: state[f"param/{name}"] for name in self.trainable}
        if self.adapter is None:
            whole = WanDiT(self.dit.config)
            whole.load_state_dict(trained, assign=True)
            save_dit(whole, self.output)
            return
        save_adapter(
            self.adapter,
            self.output,
            stage=stage_name(self.config),
            step=step,
            noise_expert=self.config.model.noise_expert,
            base_sha256=self.hashes["base_sha256"],
            tensors={**self.frozen, **trained},
        )

    @property
    def output(self) -> Path:
        """File that this stage writes into its run folder."""
        side = self.config.model.noise_expert
        suffix = "" if side == "both" else f"-{side}"
        return self.run / f"{'model' if self.adapter is None else 'adapter'}{suffix}.safetensors"

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close("FINISHED" if self._complete else "KILLED")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number
