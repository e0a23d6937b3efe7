"""One run of one stage on one rank: batch, noise, gates, forward, loss, backward, guard, step, log, save."""

from __future__ import annotations

import importlib.metadata
import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from tqdm import tqdm

from ..kernels.lora_moe import table
from ..moe_lora import WanmoeError, save_adapter
from ..moe_lora.routing import teacher_kl
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weights import save_dit
from . import checkpoint
from .config import TrainerConfig
from .data.batch import Batch, Fault, LabelGates, check_labels
from .data.loader import TrainBatches, open_reader
from .data.shards import ShardDataset
from .engine import (
    RoutedDiT,
    agree,
    init_distributed,
    lr_factor,
    make_engine,
    set_lr,
    together,
    uses_bf16,
)
from .feed import Feed
from .model import check_shards_fit, file_hashes, load_model, local_files, side_of, side_range
from .objective import draw_t, flow_matching_loss, noised, sample_generator
from .stages import STAGES, select_trainable, stage_name
from .tracking import Tracker, flatten
from .validate import held_out_losses, levels_within

# Settings that change what is learned: a resume with others is another run.
LEARNING: dict[str, Any] = {
    "adapter": True,
    "router": True,
    "objective": True,
    "optimizer": True,
    "data": {"reader", "balanced", "caption_dropout"},
    "train": {"train_router", "precision"},
}
CHOOSE = "choose another train.run or set train.resume = false"


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
        self.t_range = side_range(config, self.spec, self.dit.config.boundary)
        together(self._load_data)
        path, state, trainer = self._find_resume()
        self.step = int(trainer.get("step", 0))
        # Paths may differ between nodes; what lies there may not, as far as a quick look tells.
        paths: dict[str, Any] = {
            "model": {"dit", "adapter"},
            "data": {"shards"},
            "train": {"run"},
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
            self._check_resume(state, trainer)
            for name, parameter in self.trainable.items():
                parameter.data.copy_(state[f"param/{name}"])
        masters = {name: p.detach().float().clone() for name, p in self.trainable.items()}
        module = RoutedDiT(self.dit, self.adapter, self.spec)
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
            if unseen:
                self._say(f"no training clip shows {', '.join(unseen)}: these experts stay as they are")

    def _find_resume(self) -> tuple[Path | None, dict[str, Tensor] | None, dict[str, Any]]:
        """(folder, tensors, trainer.json) of the newest state that verifies, or nothing for a fresh start."""
        folder = self.run / "resume"
        if not self.config.train.resume:
            if self.rank == 0 and (aside := checkpoint.set_aside(folder)):
                self._say(f"starting afresh; the states of the earlier run are in {aside}")
            return None, None, {}
        path, complaints = checkpoint.latest(folder)
        for complaint in complaints:
            self._say(complaint)
        return (None, None, {}) if path is None else (path, *checkpoint.read(path))

    def _check_resume(self, state: dict[str, Tensor], trainer: dict[str, Any]) -> None:
        for key, value in self._identity().items():
            if trainer.get(key) != value:
                raise WanmoeError(
                    f"{self.run}/resume: belongs to another run ({key} was {trainer.get(key)!r}, is "
                    f"{value!r}); {CHOOSE}"
                )
        other = sorted({name.split("/", 1)[1] for name in state} ^ set(self.trainable))
        if other:
            raise WanmoeError(
                f"{self.run}/resume: {len(other)} parameters differ from this config's, e.g. {other[0]}; "
                f"{CHOOSE}"
            )

    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its resume; the world size may, at the same global batch."""
        streams = self.config.data.reader == "streaming"
        return {
            "stage": stage_name(self.config),
            "seed": self.config.train.seed,
            "steps": self.config.train.steps,
            "data": self.batches.shards.fingerprint,
            "global_batch": self.batches.global_batch,
            # Which samples a rank streams depends on both.
            **({"readers": [self.world, self.config.data.workers]} if streams else {}),
            **self.hashes,
            **flatten(self.config.model_dump(mode="json", include=LEARNING)),
        }

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
        self.run.mkdir(parents=True, exist_ok=True)
        dump = self.config.model_dump(mode="json", exclude_none=True)
        (self.run / "config.toml").write_text(tomli_w.dumps(dump))
        params = flatten(dump) | {"world_size": self.world, "trainable": self._trainable_count()}
        params |= {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
        return Tracker(self.config.tracking, self.run, params, self.step, trainer.get("mlflow_run"))

    def _trainable_count(self) -> int:
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in self.trainable.values())

    def _start_line(self) -> str:
        blocks = len(self.dit.blocks)
        prefix = f"prefix {self.dit.first_adapted} of {blocks} blocks without a graph"
        if not self.dit.prefix_frozen:
            prefix = f"all {blocks} blocks train"
        return (
            f"stage {self.config.train.stage}: {self._trainable_count():,} trainable parameters, {prefix}, "
            f"{len(self.batches.shards)} clips, {len(self.held_out)} held out, global batch "
            f"{self.batches.global_batch} on {self.world} ranks ({self.device.type}), "
            f"t in {list(self.t_range)}"
        )

    def _say(self, line: str) -> None:
        if self.rank == 0:
            tqdm.write(line, file=sys.stderr)

    def fit(self) -> None:
        """Trains up to train.steps; on SIGTERM or SIGINT saves within a step and returns."""
        config = self.config.train
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self.step == 0:
            self._validate()
        if self.step == config.steps:
            # Nothing is left to train, but a run that was killed between its last two writes lacks a file.
            self._say(f"{self.run} is complete: {self.step} steps are done")
            self._save()
        self.feed.start(self.step, config.steps)
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            disable=self.rank != 0,
            desc=f"stage {config.stage}",
            # A terminal gets a living bar, a log file a line now and then.
            mininterval=0.2 if sys.stderr.isatty() else 20,
            maxinterval=30,
        )
        began, logged_at = time.monotonic(), self.step
        stopped = False
        while self.step < config.steps and not stopped:
            values, stopped = self.train_step()
            bar.update()
            bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)
            ended = self.step == config.steps
            if self.step % config.log_every == 0 or ended:
                values["train/steps_per_s"] = (self.step - logged_at) / max(time.monotonic() - began, 1e-9)
                self._log(values)
            if ended or (config.val_every and self.step % config.val_every == 0):
                self._validate()
            if ended or stopped or (config.save_every and self.step % config.save_every == 0):
                self._save()
            if self.step % config.log_every == 0:
                # Validation and saving are not training time.
                began, logged_at, self.feed.waited = time.monotonic(), self.step, 0.0
        bar.close()
        if self.rank == 0 and stopped:
            self._say(f"stopped by signal at step {self.step}; the same command goes on from there")

    def train_step(self) -> tuple[dict[str, float], bool]:
        """One optimizer step over `accumulation` forwards; returns its figures and whether to stop."""
        config = self.config
        self.engine.train()
        lr = set_lr(self.engine, lr_factor(self.step, config, self.spec))
        totals: dict[str, float] = {}
        stop = skipped = False
        seen: list[str] = []
        for micro in range(config.train.accumulation):
            batch = self.feed.take(self.step)
            seen += batch.keys
            # Dropout, too, is a function of the position in the sample order.
            torch.manual_seed(
                sample_generator(config.train.seed, batch.positions[0], "dropout").initial_seed()
            )
            last = micro + 1 == config.train.accumulation
            self.engine.set_gradient_accumulation_boundary(last)
            losses = self.losses(batch)
            figures, finite, stop = self._agree(losses)
            if not finite:
                self._report_bad(batch.keys, "the loss is not finite")
                # What earlier forwards of this step have accumulated goes too, and the batches of the later
                # ones are read all the same: every rank stays on the same samples.
                self.engine.optimizer.zero_grad()
                for _ in range(micro + 1, config.train.accumulation):
                    self.feed.take(self.step)
                skipped = True
                break
            totals = {k: totals.get(k, 0.0) + v / config.train.accumulation for k, v in figures.items()}
            self.engine.backward(losses["loss"])
            self._check_gradients(last)
            self.engine.step()
        self.step += 1
        if not skipped and not self.engine.was_step_applied():
            self._report_bad(seen, "the gradient is not finite")
            skipped = True
        values = {f"train/{name}": value for name, value in totals.items()} | {"train/lr": lr}
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

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses of one batch: `loss` is the sum that trains, the others are its terms."""
        config, device = self.config, self.device
        x_t, t, target = self._noise(batch)
        context = self._drop_captions(batch)
        image = (
            None if batch.image_latent is None else batch.image_latent.to(device, non_blocking=True).float()
        )
        rule = batch.rule.to(device)
        v, probs = self.engine(x_t, t, context, batch.pooled.to(device), rule, image)
        losses = {"diffusion": flow_matching_loss(v, target).mean()}
        losses["loss"] = losses["diffusion"]
        if "router" in self.spec.trains:
            losses["teacher_kl"] = teacher_kl(probs, rule)
            losses["loss"] = losses["loss"] + config.objective.teacher_kl * losses["teacher_kl"]
        return losses

    def _noise(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        streams = [sample_generator(self.config.train.seed, p, "noise") for p in batch.positions]
        u = torch.cat([torch.rand(1, generator=stream, dtype=torch.float64) for stream in streams])
        noise = torch.stack([torch.randn(batch.latent.shape[1:], generator=stream) for stream in streams])
        t = draw_t(u, self.config.objective, self.t_range).to(self.device)
        # First to the card, then to fp32: the other way round the host would convert, out of pinned memory.
        latent = batch.latent.to(self.device, non_blocking=True).float()
        x_t, target = noised(latent, noise.to(self.device), t)
        return x_t, t, target

    def _drop_captions(self, batch: Batch) -> list[Tensor]:
        """The text of each clip, now and then that of an empty caption, which guidance subtracts later."""
        context = []
        for position, tokens in zip(batch.positions, batch.context, strict=True):
            draw = torch.rand(1, generator=sample_generator(self.config.train.seed, position, "caption"))
            if self.batches.null_context is not None and float(draw) < self.caption_dropout:
                tokens = self.batches.null_context
            context.append(tokens.to(self.device, non_blocking=True).to(self._dtype))
        return context

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.engine.bfloat16_enabled() else torch.float32

    def _agree(self, losses: dict[str, Tensor]) -> tuple[dict[str, float], bool, bool]:
        """(mean figures over ranks, whether the loss is finite on all, whether any rank was told to stop)."""
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
        deadline = min(max(epoch, 4), self.config.train.steps) - 1
        dead = sorted(self.unseen_gradients)
        if self.step == deadline and dead and self.step >= 3:
            raise WanmoeError(
                f"{len(dead)} of {len(self.trainable)} parameters of stage {self.config.train.stage} "
                f"have had no gradient in {self.step + 1} steps, e.g. {dead[0]}"
            )
        if self.step >= deadline:
            self.unseen_gradients.clear()

    def _log(self, values: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(self.step, {k: v for k, v in values.items() if math.isfinite(v)})

    def _validate(self) -> None:
        self.engine.eval()

        def predict(x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
            image = None if batch.image_latent is None else batch.image_latent.to(self.device).float()
            context = [tokens.to(self.device, self._dtype) for tokens in batch.context]
            rule = batch.rule.to(self.device)
            v: Tensor = self.engine(x_t, t, context, batch.pooled.to(self.device), rule, image)[0]
            return v

        levels = levels_within(side_of(self.config.model.noise_expert, self.dit.config.boundary))
        faults: list[Fault] = []
        losses = held_out_losses(
            predict,
            self.held_out,
            self.gates,
            levels=levels,
            batch=self.config.data.val_batch or self.config.data.batch,
            device=self.device,
            faults=faults,
        )
        self.feed.report(self.step, faults)
        means = losses.nanmean(0)
        values = {f"val/loss_t{level}": float(x) for level, x in zip(levels, means, strict=True)}
        self._log({"val/loss": float(means.mean())} | values)
        self._say(f"step {self.step}: held-out loss {means.mean():.4f}")

    def _save(self) -> None:
        """Resume state and result file; gathers what trains, and nothing frozen."""
        state = checkpoint.gather_state(self.trainable)
        if self.rank == 0:
            self._write(state)
            self._say(f"step {self.step}: wrote {self.output}")
        dist.barrier()

    def _write(self, state: dict[str, Tensor]) -> None:
        # The result first: a run whose state says that it is finished has its file.
        self._write_output({name: state[f"param/{name}"] for name in self.trainable})
        trainer = self._identity() | {"step": self.step, "world_size": self.world}
        trainer["bad_samples"] = self.feed.bad_samples
        trainer["mlflow_run"] = self.tracker.run_id if self.tracker else None
        checkpoint.commit(self.run / "resume", state, trainer, self.config.train.keep)
        if self.tracker is not None and self.step == self.config.train.steps:
            self.tracker.artifact(self.run / "config.toml")
            self.tracker.artifact(self.output)

    def _write_output(self, trained: dict[str, Tensor]) -> None:
        if self.adapter is None:
            whole = WanDiT(self.dit.config)
            whole.load_state_dict(trained, assign=True)
            save_dit(whole, self.output)
            return
        save_adapter(
            self.adapter,
            self.output,
            stage=stage_name(self.config),
            step=self.step,
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
            done = self.step >= self.config.train.steps
            self.tracker.close("FINISHED" if done else "KILLED")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number
