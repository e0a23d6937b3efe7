"""The batches of one rank, in order, from either reader; what cannot be read is replaced and reported."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ...moe_lora import WanmoeError
from .batch import Batch, Fault, LabelGates, collate, instrument_weights
from .order import SampleOrder
from .shards import Sample, ShardDataset, ShardError

if TYPE_CHECKING:
    from ..config import DataConfig
    from .stream import ShardStream


def open_reader(config: DataConfig, seed: int) -> ShardDataset | ShardStream:
    """The training split by the reader that the config names."""
    if config.reader == "indexed":
        return ShardDataset(config.shards, "train")
    from .stream import ShardStream  # webdataset, for this reader alone

    return ShardStream(config.shards, "train", seed=seed)


class Plan(NamedTuple):
    """One forward of this rank: its number over all steps, its step, and what it reads."""

    number: int
    step: int
    positions: list[int]


class TrainBatches:
    """Endless batches of one rank from a given step on.

    The global batch of a step is batch x world x accumulation consecutive positions of the sample order;
    forward m of rank r takes the (m * world + r)-th run of `batch` positions. Read by offset
    (`ShardDataset`), the samples are the same for any number of ranks and workers. Streamed (`ShardStream`),
    the sizes are, and which samples a rank sees depends on both numbers.

    Args:
        shards: the reader.
        workers: reader processes; 0 reads in this one.
        max_bad: more samples than this in a row that cannot be read are an error.
        pin: copy batches to pinned memory, from where a card fetches them faster.
    """

    def __init__(
        self,
        shards: ShardDataset | ShardStream,
        gates: LabelGates,
        *,
        batch: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        balanced: bool,
        workers: int,
        caption_dropout: float = 0.0,
        max_bad: int = 0,
        pin: bool = False,
    ) -> None:
        self.shards, self.gates, self.workers = shards, gates, workers
        self.batch, self.accumulation, self.rank, self.world = batch, accumulation, rank, world
        self.max_bad, self.pin = max_bad, pin
        self.sizes = list(shards.buckets)
        self.order = SampleOrder(
            list(shards.buckets.values()),
            global_batch=batch * world * accumulation,
            seed=seed,
            weights=instrument_weights(shards) if balanced else None,
        )
        if balanced and not isinstance(shards, ShardDataset):
            raise WanmoeError(
                f"{shards.root}: a stream cannot be balanced over the instruments; "
                'set data.balanced = false, or data.reader = "indexed"'
            )
        self.null_context = shards.null_context
        if caption_dropout and self.null_context is None:
            raise WanmoeError(
                f"{shards.root}: prepared without the encoding of an empty caption; prepare the clips again "
                "or set data.caption_dropout = 0"
            )

    @property
    def global_batch(self) -> int:
        return self.order.global_batch

    def positions(self, step: int, micro: int) -> list[int]:
        """Positions in the sample order of one forward of this rank."""
        first = step * self.global_batch + (micro * self.world + self.rank) * self.batch
        return list(range(first, first + self.batch))

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        """accumulation batches for each of the steps start .. stop - 1; raises WanmoeError as they come."""
        numbers = range(start * self.accumulation, stop * self.accumulation)
        source: _ByOffset | _Streamed
        if isinstance(self.shards, ShardDataset):
            source = _ByOffset(self, self.shards, numbers)
        else:
            source = _Streamed(self, self.shards, numbers)
        loader: Iterable[Batch | WanmoeError] = DataLoader(
            source, batch_size=None, collate_fn=_as_it_is, num_workers=self.workers, pin_memory=self.pin
        )
        for made in loader:
            # An exception that crosses from a worker process by itself loses its line in a traceback's text.
            if isinstance(made, WanmoeError):
                raise made
            yield made

    def plan(self, number: int) -> Plan:
        """The forward of this number, counted over all steps."""
        step, micro = divmod(number, self.accumulation)
        return Plan(number, step, self.positions(step, micro))

    def make(self, plan: Plan, pairs: Sequence[tuple[Sample, list[Fault]]]) -> Batch | WanmoeError:
        """The batch of samples that were read; an error of their labels comes back as a value."""
        faults = [fault for _, own in pairs for fault in own]
        try:
            return collate([sample for sample, _ in pairs], plan.positions, self.gates, faults)
        except WanmoeError as error:
            return error

    def given_up(self, faults: Sequence[Fault]) -> WanmoeError:
        return WanmoeError(
            f"{self.shards.root}: {len(faults)} samples in a row cannot be read, at last {faults[-1].reason};"
            " see `wanmoe data verify` and `wanmoe data repair`"
        )


def _as_it_is(made: Any) -> Any:
    return made


class _ByOffset(Dataset[Batch | WanmoeError]):
    """Item i is the batch of the i-th of some forwards, read by offset."""

    def __init__(self, batches: TrainBatches, shards: ShardDataset, numbers: range) -> None:
        self.batches, self.shards, self.numbers = batches, shards, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> Batch | WanmoeError:
        plan = self.batches.plan(self.numbers[item])
        pairs = []
        for position in plan.positions:
            faults: list[Fault] = []
            while True:
                index = self.batches.order.replacement(position, len(faults))
                try:
                    pairs.append((self.shards[index], faults))
                    break
                except ShardError as error:
                    faults.append(Fault(self.shards.keys[index], str(error)))
                if len(faults) > self.batches.max_bad:
                    return self.batches.given_up(faults)
        return self.batches.make(plan, pairs)


class _Streamed(IterableDataset[Batch | WanmoeError]):
    """The batches of some forwards in order; each of w workers makes every w-th from a stream of its own."""

    def __init__(self, batches: TrainBatches, shards: ShardStream, numbers: range) -> None:
        self.batches, self.shards, self.numbers = batches, shards, numbers

    def __iter__(self) -> Iterator[Batch | WanmoeError]:
        info = get_worker_info()
        first, workers = self.numbers.start, 1 if info is None else info.num_workers
        # The loader asks its workers in turn, from worker 0 on, whichever forward is the first.
        worker = (first + (0 if info is None else info.id)) % workers
        batches, order = self.batches, self.batches.order
        steps = order.buckets_before(-(-first // batches.accumulation))
        mine = np.repeat(steps, batches.accumulation)[worker:first:workers]
        used = [batches.batch * int(count) for count in np.bincount(mine, minlength=len(order.buckets))]
        part, parts = batches.rank * workers + worker, batches.world * workers
        streams = [
            _Ahead(self.shards.samples(size, part, parts, skip))
            for size, skip in zip(batches.sizes, used, strict=True)
        ]
        for number in self.numbers:
            if number % workers == worker:
                plan = batches.plan(number)
                yield self._read(plan, streams[order.bucket(plan.step)])

    def _read(self, plan: Plan, stream: _Ahead) -> Batch | WanmoeError:
        pairs = []
        for _ in plan.positions:
            sample, faults = stream.take(self.batches.max_bad)
            if sample is None:
                return self.batches.given_up(faults)
            pairs.append((sample, faults))
        return self.batches.make(plan, pairs)


class _Ahead:
    """A stream whose faulty items are replaced by the next sound one, which still comes in its own turn.

    So the place in the stream depends on nothing but the number of items taken.
    """

    def __init__(self, stream: Iterator[Sample | ShardError]) -> None:
        self.stream = stream
        self.held: deque[Sample | ShardError] = deque()

    def take(self, max_bad: int) -> tuple[Sample | None, list[Fault]]:
        """The next sample and the faults met on the way to it; None after more than `max_bad` of them."""
        item = self.held.popleft() if self.held else next(self.stream)
        faults: list[Fault] = []
        while isinstance(item, ShardError):
            faults.append(Fault(item.key or item.shard, str(item)))
            if len(faults) > max_bad:
                return None, faults
            if len(faults) > len(self.held):
                self.held.append(next(self.stream))
            item = self.held[len(faults) - 1]
        return item, faults
