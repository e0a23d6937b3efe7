"""Batches that all ranks take together: what one cannot read is known, counted and limited on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..moe_lora import WanmoeError
from .data.batch import Batch, Fault
from .data.loader import TrainBatches


class Feed:
    """The batches of one rank, in step with the others.

    Every method that talks is called by all ranks alike.

    Args:
        batches: what this rank reads.
        limit: samples that may be unreadable over the whole run.
        known: why samples could not be read before a resume, by key.
        say: takes a line for the user.
    """

    def __init__(
        self, batches: TrainBatches, limit: int, known: Mapping[str, str], say: Callable[[str], object]
    ) -> None:
        self.batches, self.limit, self.say = batches, limit, say
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.bad_samples = dict(known)
        """Why a sample could not be read, by key, over all ranks."""
        self._waited = 0.0
        self._made: Iterator[Batch] = iter(())
        # What the ranks tell each other about data does not wait for the card.
        self._group = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None

    def start(self, start: int, stop: int) -> None:
        """Begins to read for the steps start .. stop - 1."""
        self._made = self.batches(start, stop)

    def take(self, step: int) -> Batch:
        """This rank's next batch, once all ranks have theirs; where one has none, all raise its error."""
        made, error, asked = None, None, time.monotonic()
        try:
            made = next(self._made)
        except WanmoeError as caught:
            error = str(caught)
        told = torch.zeros(2 + self.world)
        told[0], told[1] = float(made is None), float(made is not None and len(made.faults) > 0)
        told[2 + self.rank] = time.monotonic() - asked
        dist.all_reduce(told, group=self._group)
        self._waited += float(told[2:].max())
        errors = self.gather(error) if told[0] > 0 else []
        for rank, text in enumerate(errors):
            if text is not None:
                raise WanmoeError(f"on rank {rank}: {text}")
        if made is None:  # told above: never without an error of its own
            raise AssertionError("a rank without a batch has told the others")
        if told[1] > 0:
            self.report(step, made.faults)
        return made

    def take_wait(self) -> float:
        """Seconds that the slowest rank has waited for its data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def any(self, own: bool) -> bool:
        """Whether any rank says so."""
        told = torch.tensor([float(own)])
        dist.all_reduce(told, group=self._group)
        return bool(told > 0)

    def decide(self, choice: int) -> int:
        """The choice of rank 0, for all."""
        told = torch.tensor([choice])
        dist.broadcast(told, 0, group=self._group)
        return int(told)

    def report(self, step: int, own: Sequence[Fault]) -> None:
        """Names what any rank could not read; too many of them over the run are an error on all ranks."""
        for fault in (fault for part in self.gather(list(own)) for fault in part):
            if fault.key not in self.bad_samples:
                self.bad_samples[fault.key] = fault.reason
                self.say(f"step {step}: replaced a sample that cannot be read: {fault.reason}")
        if len(self.bad_samples) > self.limit:
            raise WanmoeError(
                f"{self.batches.shards.root}: {len(self.bad_samples)} samples cannot be read, at last "
                f"{list(self.bad_samples.values())[-1]}; copy the shards anew or raise data.max_bad_samples "
                "(a folder that `wanmoe data repair` has mended is for a new run)"
            )

    def gather(self, own: Any) -> list[Any]:
        """What every rank says, in the order of the ranks."""
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, own, group=self._group)
        return every
