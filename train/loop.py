"""One run of one stage on one rank: batch, noise, gates, forward, loss, backward, guard, step, log, save."""

from __future__ import annotations

import importlib.metadata
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..moe_lora import WanmoeError
from ..moe_lora.errors import CommonError
from ..moe_lora.ring import BlockRing
from ..moe_lora.wan.sequence import SequenceParallel, sequence_parallel
from . import checkpoint, resume
from .config import TrainerConfig
from .data.batch import Batch, Fault, LabelGates, check_labels
from .data.loader import TrainBatches, open_reader
from .data.shards import ShardDataset
from .engine import uses_bf16
from .feed import Feed
from .model import (
    check_shards_fit,
    file_hashes,
    open_store,
    plan_of,
    side_configs,
)
from .objective import Loss
from .ranks import agree, init_distributed, together
from .routed import whole_router
from .samples import Samples
from .saver import Saver
from .side import Side, check_alike, order_of_sides
from .stages import STAGES, stage_name, total_steps, with_accumulation
from .tracking import Tracker, flatten
from .watchdog import Watchdog, watch_over


def train(config: TrainerConfig) -> list[Path]:
    """Runs one stage to its end, or to a stop signal, and returns the files it wrote.

    Every rank of the launcher calls this. Raises WanmoeError for faults in config, data or weights.
    """
    rank, world, device = init_distributed()
    with watch_over(config.train, rank, world) as watchdog:
        trainer = Trainer(config, rank, world, device, watchdog)
        failed = True
        try:
            trainer.fit()
            failed = False
        finally:
            trainer.close(failed)
    return [side.output(trainer.run) for side in trainer.sides]


class Trainer:
    """State of one run on one rank: its models, the batches that they share, and where it stands."""

    def __init__(
        self, config: TrainerConfig, rank: int, world: int, device: torch.device, watchdog: Watchdog
    ) -> None:
        self.rank, self.world, self.device, self.watchdog = rank, world, device, watchdog
        self.stop_signal: int | None = None
        # From here on: a job that is told to stop while it loads stops after its first step, in order.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        shared = config.train.sequence_parallel
        # Ranks that share a clip are one rank to whatever deals with clips.
        self.clip_rank, self.clip_world = rank // shared, world // shared
        self.config = config = with_accumulation(config, max(self.clip_world, 1))
        self.spec = STAGES[stage_name(config)]
        self.run = config.train.run
        self.sides = self._load_sides()
        check_alike(self.sides)
        # What a file and the stage decided is what the run writes down.
        decided = {key: getattr(self.sides[0].config, key) for key in ("adapter", "router")}
        self.config = config = config.model_copy(update=decided)
        sequence = together(self._share_clips)
        for side in self.sides:
            side.dit.sequence = sequence
        together(self._load_data)
        shards, global_batch = self.batches.shards, self.batches.global_batch
        self.steps = total_steps(config, self.spec, len(shards), global_batch)
        self.order = order_of_sides(self.sides, self.steps)
        for index, side in enumerate(self.sides):
            together(lambda side=side, index=index: self._prepare(side, self.order.count(index)))  # type: ignore[misc]
        state, trainer = resume.find(self.run, config.train.resume, rank, self._say)
        self.step = int(trainer.get("step", 0))
        resume.agree_on_start(config, self.sides, self.batches, self.plan)
        agree(self._identity())
        if state is not None:
            names = [side.prefix + name for side in self.sides for name in side.trainable]
            together(lambda: resume.check(self.run, state, trainer, self._identity(), names))
        self._say(self._start_line())
        for index, side in enumerate(self.sides):
            side.start(
                state, self.order[: self.step].count(index), trainer.get("updates", {}).get(side.name, 0)
            )
            self.watchdog.beat(self.step)
            if line := side.describe_loading():
                self._say(line)
        if state is not None:
            self._say(f"resuming {self.run} at step {self.step}")
        self.bad_steps, self.skipped = int(trainer.get("bad_steps", 0)), int(trainer.get("skipped", 0))
        self.owed = bool(trainer.get("owed", False))
        bad_samples = trainer.get("bad_samples", {})
        self.feed = Feed(self.batches, config.data.max_bad_samples, bad_samples, self._say)
        self.saver = Saver()
        self.tracker = together(lambda: self._tracker(trainer))
        for side in self.sides:
            side.observe(self.tracker, trainer.get("best", {}).get(side.name))
        self.samples = together(self._open_samples) if config.train.sample_every else None

    # ------------------------------------------------------------------------------------------ to its start

    def _load_sides(self) -> list[Side]:
        configs = side_configs(self.config)
        # Hashing 28 GB takes a while: once, not once per rank.
        hashes = [
            together(
                lambda: {name: file_hashes(one) for name, one in configs.items()} if self.rank == 0 else {}
            )
        ]
        dist.broadcast_object_list(hashes)
        self.watchdog.beat(0)
        self.plan = plan_of(self.config, list(configs.values()), self.world, self.device)
        self.ring = BlockRing(self.device, self.config.ring.slots)
        dtype = torch.bfloat16 if uses_bf16(self.config, self.device) else None
        more: dict[str, Any] = {"alone": len(configs) == 1, "say": self._say}
        sides: list[Side] = []
        for name, one in configs.items():
            store = open_store(one, self.plan, dtype, self.device)
            of_it = (one, name, self.plan, self.device, hashes[0][name])
            sides.append(together(partial(Side, *of_it, store=store, **more)))
            self.watchdog.beat(0)
        for side in sides:
            side.stream(self.ring)
        return sides

    def _share_clips(self) -> SequenceParallel | None:
        heads = self.sides[0].dit.config.num_heads
        return sequence_parallel(self.config.train.sequence_parallel, heads)

    def _load_data(self) -> None:
        config, adapter = self.config, self.sides[0].adapter
        experts, router = (
            (adapter.experts, adapter.router_config)
            if adapter is not None
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
            rank=self.clip_rank,
            world=self.clip_world,
            seed=config.train.seed,
            balanced=config.data.balanced and by_label,
            workers=config.data.workers,
            caption_dropout=self.caption_dropout,
            max_bad=config.data.max_bad_samples,
            pin=self.device.type == "cuda",
        )
        check_shards_fit(self.sides[0].dit, dataset)
        if by_label:
            unseen = check_labels(dataset, self.gates)
            check_labels(self.held_out, self.gates)
            if unseen:
                self._say(f"no training clip shows {', '.join(unseen)}: nothing is routed to these experts")

    def _prepare(self, side: Side, steps: int) -> None:
        side.prepare(
            self.batches.shards,
            self.gates,
            self.held_out,
            steps=steps,
            global_batch=self.batches.global_batch,
            caption_dropout=self.caption_dropout,
        )

    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its resume; the world size may, at the same global batch."""
        # Which samples a rank streams depends on both numbers.
        streams = self.config.data.reader == "streaming"
        readers = {"readers": [self.clip_world, self.config.data.workers]} if streams else {}
        hashes = {side.prefix + key: value for side in self.sides for key, value in side.hashes.items()}
        return resume.identity(
            self.config,
            steps=self.steps,
            data=self.batches.shards.fingerprint,
            global_batch=self.batches.global_batch,
            **readers,
            **hashes,
        )

    def _tracker(self, trainer: dict[str, Any]) -> Tracker | None:
        if self.rank != 0:
            return None
        params = flatten(resume.write_config(self.config, self.run, self.steps)) | {
            "world_size": self.world,
            "zero_stage": self.plan.stage,
            "trainable": sum(side.count for side in self.sides),
        }
        params |= {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "mlflow")}
        run_id = trainer.get("mlflow_run")
        tracker = Tracker(self.config.tracking, self.run, params, self.step, run_id, say=self._say)
        shards = self.batches.shards
        tracker.dataset(shards.root, shards.manifest, shards.fingerprint)
        return tracker

    def _open_samples(self) -> Samples:
        beat = lambda: self.watchdog.beat(self.step)  # noqa: E731
        return Samples(self.config, self.sides, self.held_out, self.gates, self.device, self._enter, beat)

    def _start_line(self) -> str:
        shared = (
            f"stage {self.config.train.stage}: {len(self.batches.shards)} clips, {len(self.held_out)} held "
            f"out, global batch {self.batches.global_batch} on {self.world} ranks ({self.device.type}), "
            f"{self.steps} steps; {self.plan.why}"
        )
        return "\n".join([shared, *(f"model{side.label}: {side.describe()}" for side in self.sides)])

    def _say(self, line: str) -> None:
        if self.rank == 0:
            tqdm.write(line, file=sys.stderr)

    # ----------------------------------------------------------------------------------------------- the run

    def fit(self) -> None:
        """Trains to the last step or an early stop; told to stop by a signal, saves within a step and
        returns."""
        config = self.config.train
        if self.step == 0 and self._validate():
            self._save()
        if self._complete:
            # Nothing is left to train, but a run that was killed between its last two writes lacks a file.
            self._say(f"{self.run} is complete: {self.step} steps are done")
            self._save(last=True)
        elif self.owed and self._validate():
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
        stopped = False
        while not self._complete and not stopped:
            side = self._side_of_step()
            began = time.monotonic()
            values, stopped = self.train_step(side)
            side.pace.add(time.monotonic() - began, self.feed.take_wait())
            self.watchdog.beat(self.step)
            bar.update()
            bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)
            if self._logs(side):
                waits = {"ring/wait_s": self.ring.copies.stall()} if self.plan.stream else {}
                side.watch.log(self.step, values | waits | side.pace.take() | side.meter.reduce())
            ended = self.step == self.steps
            due = ended or bool(config.val_every and self.step % config.val_every == 0)
            # Who is told to stop has little time: the validation of this step is the next start's.
            self.owed = due and stopped and not ended
            best = due and not self.owed and self._validate()
            if due and not self.owed:
                stopped = self.feed.any(self.stop_signal is not None)
            saves = bool(config.save_every and self.step % config.save_every == 0)
            if self._complete or stopped or best or saves:
                self._save(last=self._complete or stopped)
            if config.sample_every and (ended or (self.step % config.sample_every == 0 and not stopped)):
                self._sample()
            self.watchdog.beat(self.step)
        bar.close()
        together(self.saver.wait)
        if self.tracker is not None and self._complete:
            self.tracker.artifact(self.run / "config.toml")
            for side in self.sides:
                step = self.step if side.watch.writes(self.step) else int(side.watch.best["step"])
                path = side.output(self.run)
                self.tracker.model(path, path.stem, step, side.tags)
        if self.rank == 0 and stopped:
            self._say(f"stopped by signal at step {self.step}; the same command goes on from there")

    @property
    def _complete(self) -> bool:
        return self.step >= self.steps or all(side.watch.ended for side in self.sides)

    def _logs(self, side: Side) -> bool:
        """Whether a side, after a step of its own, has something to tell."""
        return side.step % self.config.train.log_every == 0 or side.step == side.steps

    def _side_of_step(self) -> Side:
        """The side of the next step: one decision, taken by rank 0 and followed by all.

        Ranks that ran different models would mix halves of both under ZeRO-3.
        """
        if len(self.sides) == 1:
            return self.sides[0]
        side = self.sides[self.feed.decide(self.order[self.step])]
        self._enter(side)
        return side

    def _enter(self, side: Side) -> None:
        """Brings a model to the card, where they take turns."""
        for other in self.sides:
            if other is not side:
                other.leave()
        side.enter()

    def train_step(self, side: Side) -> tuple[dict[str, float], bool]:
        """One optimizer step over `accumulation` forwards; returns its figures and whether to stop."""
        config = self.config
        lr = side.begin()
        batches: Iterator[Batch] = (self.feed.take(self.step) for _ in range(config.train.accumulation))
        if side.objective.router_terms:  # the router is asked for the whole step first
            taken = list(batches)
            side.objective.open_window(taken, whole_router(side.adapter))
            batches = iter(taken)
        seen: list[str] = []
        totals: dict[str, float] = {}
        norms: dict[str, float] = {}
        stop = skipped = False
        for micro, batch in enumerate(batches):
            seen += batch.keys
            side.seed_dropout(batch)
            last = micro + 1 == config.train.accumulation
            side.engine.set_gradient_accumulation_boundary(last)
            loss = side.objective(batch, side.step, side.dtype, side.predict)
            figures, finite, stop = self._agree(loss)
            if not finite:
                self._report_bad(batch.keys, "the loss is not finite")
                # What earlier forwards of this step have accumulated goes too, and the batches of the later
                # ones are read all the same: every rank stays on the same samples.
                side.drop_gradients()
                deque(batches, maxlen=0)
                skipped = True
                break
            totals = {k: totals.get(k, 0.0) + v / config.train.accumulation for k, v in figures.items()}
            side.meter.add(loss)
            side.engine.backward(loss.total)
            if not last:
                side.engine.step()
                continue
            side.check_gradients()
            if (side.step + 1) % config.train.log_every == 0 or side.step + 1 == side.steps:
                norms = side.gradient_norms()
            if not side.update():
                self._report_bad(seen, "the gradient is not finite")
                skipped = True
        self.step += 1
        side.step += 1
        values = {f"train/{name}": value for name, value in totals.items()} | {"train/lr": lr} | norms
        values["train/skipped_steps"] = float(self.skipped)
        values["data/bad_samples"] = float(len(self.feed.bad_samples))
        values.setdefault("train/loss", math.nan)
        if not skipped:
            self.bad_steps = 0
            values["train/grad_norm"] = side.grad_norm
        return values, stop

    def _agree(self, loss: Loss) -> tuple[dict[str, float], bool, bool]:
        """(mean figures over ranks, whether the loss is finite on all, whether any rank was told to stop).

        Raises WanmoeError on all ranks where a save has failed.
        """
        losses = {"loss": loss.total, **loss.terms}
        values = torch.stack([value.detach().float() for value in losses.values()])
        finite = torch.isfinite(values).all()
        told = [float(self.stop_signal is not None), float(self.saver.failed)]
        packed = torch.cat([torch.nan_to_num(values), (~finite).float()[None], values.new_tensor(told)])
        dist.all_reduce(packed)
        *means, bad, stop, failed = (packed / self.world).tolist()
        if failed > 0:
            together(self.saver.wait)
        return dict(zip(losses, means, strict=True)), bad == 0, stop > 0

    def _report_bad(self, own_keys: list[str], cause: str) -> None:
        self.bad_steps += 1
        self.skipped += 1
        every = [key for part in self.feed.gather(own_keys) for key in part]
        named = ", ".join(dict.fromkeys(every))
        self._say(f"step {self.step + 1}: {cause}; skipped on all ranks; samples: {named}")
        if self.bad_steps >= self.config.train.max_bad_steps:
            self.bad_steps = 0
            self._save(last=True)  # what was learned before these steps is good
            together(self.saver.wait)
            raise CommonError(
                f"{self.config.train.max_bad_steps} steps in a row were skipped, at last because {cause} "
                f"(samples: {named}); lower optimizer.lr or check the shards with `wanmoe data verify`"
            )

    def _validate(self) -> bool:
        """Measures the held-out clips; whether any side is at its best so far, where early stopping asks."""
        best = False
        for side in self.sides:
            self._enter(side)
            faults: list[Fault] = []
            held_out = side.validate(faults, lambda: self.watchdog.beat(self.step))
            self.feed.report(self.step, faults)
            best |= side.watch.validated(self.step, held_out, side.levels)
        return best

    def _sample(self) -> None:
        """Makes the videos of this step, on all ranks; rank 0 has them."""
        if self.samples is None:
            return
        for path in self.samples.make(self.step, write=self.rank == 0):
            if self.tracker is not None:
                self.tracker.artifact(path, f"samples/{path.parent.name}")
            self._say(f"step {self.step}: {path}")

    # --------------------------------------------------------------------------------------------- its traces

    def _save(self, last: bool = False) -> None:
        """Resume state and result files: gathers what trains, and nothing frozen, and writes it while
        training goes on; of the `last` one no fault is forgiven."""
        state: dict[str, Tensor] = {}
        for side in self.sides:
            state |= side.state()
        facts = self._identity() | {"step": self.step, "world_size": self.world}
        facts |= {
            "bad_samples": dict(self.feed.bad_samples),
            "best": {side.name: dict(side.watch.best) for side in self.sides},
            "updates": {side.name: side.updates for side in self.sides},
            "bad_steps": self.bad_steps,
            "skipped": self.skipped,
            "owed": self.owed,
            "mlflow_run": self.tracker.run_id if self.tracker else None,
        }
        writes = [(side.watch.writes(self.step), side.step) for side in self.sides]

        def write() -> None:
            try:
                self._write(state, facts, writes)
            except WanmoeError as error:
                if last or self.config.train.save_failure == "stop":
                    raise
                self._say(f"step {facts['step']}: {error}; training goes on (train.save_failure)")

        if self.rank == 0:
            together(lambda: self.saver.submit(write))
        else:
            together(lambda: None)

    def _write(self, state: dict[str, Tensor], facts: dict[str, Any], writes: list[tuple[bool, int]]) -> None:
        # The results first: a run whose state says that it is finished has its files.
        step, folder, told = facts["step"], self.run / "resume", []
        for index, (side, (now, own_step)) in enumerate(zip(self.sides, writes, strict=True)):
            path, best = side.output(self.run), facts["best"][side.name].get("step")
            if now:
                side.write(path, state, own_step)
                told.append(f"wrote {path}")
            elif not path.exists():
                older = checkpoint.read(checkpoint.state_of(folder, best))[0]
                side.write(path, older, self.order[:best].count(index))
                told.append(f"wrote {path} of step {best}, the best")
            else:
                told.append(f"saved; {path} is that of step {best}")
        spare = {best["step"] for best in facts["best"].values() if best}
        checkpoint.commit(folder, state, facts, self.config.train.keep, spare)
        # What is said is there whatever happens next.
        for line in told:
            self._say(f"step {step}: {line}")

    def close(self, failed: bool = False) -> None:
        """Ends the run on this rank."""
        if self.tracker is not None:
            self.tracker.close("FAILED" if failed else "FINISHED" if self._complete else "KILLED")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number
