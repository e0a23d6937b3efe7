"""Reading shards, measured: by offset, streamed, and with plain webdataset, by workers, cold and warm.

Samples have the size of Wan2.2 A14B's and random contents, which do not compress. Every reader delivers the
same thing: batches of one clip, latent and text, as tensors of this process. Plain webdataset reads a folder
in its own usual form, the text beside the latent in the same tar; it checks nothing of what it reads.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader

from ..kernels.bench.provenance import provenance
from ..kernels.bench.record import write_text
from ..moe_lora import ExpertSet, RouterConfig, WanmoeError
from ..train.data.batch import LabelGates
from ..train.data.loader import TrainBatches
from ..train.data.shard_writer import ShardWriter
from ..train.data.shards import ShardDataset
from ..train.data.stream import ShardStream

FORMAT = "wanmoe-bench-data/1"
READERS = ("indexed", "streaming", "webdataset")
PER_SHARD = 8  # samples: so that every worker of a stream has shards of its own
_HEAD = {"name": "random", "fingerprint": "0", "stand_in": True}


@dataclass(frozen=True)
class Sizes:
    """What is written: `samples` of a bf16 latent [16, *latent] and a bf16 text [tokens, width] each."""

    samples: int = 96
    latent: tuple[int, int, int] = (21, 60, 104)
    tokens: int = 512
    width: int = 4096

    @property
    def sample_bytes(self) -> int:
        frames, height, width = self.latent
        return 2 * (16 * frames * height * width + self.tokens * self.width)


@dataclass
class Timing:
    """One reader with one number of workers, cold or warm; a value per round."""

    reader: str
    workers: int
    cold: bool
    first_s: list[float]
    """Seconds until the first batch is there: opening, starting the workers, filling a shuffle buffer."""
    rate: list[float]
    """Samples a second from opening to the last batch: what is read ahead is read inside the clock."""


def bench_data(
    sizes: Sizes,
    workers: Sequence[int],
    rounds: int,
    scratch: Path | None,
    argv: list[str],
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Writes both folders, reads them in every way, in a fresh random order each round, and returns what was
    measured, with where and by what; the folders are removed."""
    if min(workers, default=-1) < 0 or rounds < 1 or sizes.samples < 2:
        raise WanmoeError("bench data: needs workers >= 0, rounds >= 1 and samples >= 2")
    with _folders(sizes, scratch, say) as (ours, plain):
        cases = [
            Timing(reader, count, cold, [], [])
            for reader in READERS
            for count in workers
            for cold in (True, False)
        ]
        draw = random.Random(0)
        for turn in range(rounds):
            for case in draw.sample(cases, len(cases)):
                open_reader = {
                    "indexed": partial(_ours, ShardDataset(ours), case.workers, sizes.samples),
                    "streaming": partial(_ours, ShardStream(ours, seed=0), case.workers, sizes.samples),
                    "webdataset": partial(_plain, plain, case.workers),
                }[case.reader]
                _touch(plain if case.reader == "webdataset" else ours, cold=case.cold)
                first, rate = _time(open_reader, sizes.samples)
                case.first_s.append(first)
                case.rate.append(rate)
            say(f"round {turn + 1} of {rounds}")
    mib = sizes.sample_bytes / 2**20
    return {
        "format": FORMAT,
        "provenance": provenance(torch.device("cpu"), argv),
        "sizes": asdict(sizes) | {"sample_mib": mib},
        "rows": [
            asdict(case)
            | {
                "samples_per_s": statistics.median(case.rate),
                "mib_per_s": statistics.median(case.rate) * mib,
                "start_s": statistics.median(case.first_s),
            }
            for case in cases
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The figures as text: median samples/s with the range of the rounds, MiB/s, seconds to start."""
    lines = [
        f"{result['sizes']['samples']} samples of {result['sizes']['sample_mib']:.1f} MiB, median of "
        f"{len(result['rows'][0]['rate'])} rounds (lowest to highest)",
        f"{'reader':<11} {'workers':>7} {'files':>5} {'samples/s':>22} {'MiB/s':>7} {'start s':>8}",
    ]
    for row in result["rows"]:
        spread = f"{row['samples_per_s']:.1f} ({min(row['rate']):.1f} to {max(row['rate']):.1f})"
        lines.append(
            f"{row['reader']:<11} {row['workers']:>7} {'cold' if row['cold'] else 'warm':>5} {spread:>22} "
            f"{row['mib_per_s']:>7.0f} {row['start_s']:>8.2f}"
        )
    return "\n".join(lines)


def write_result(result: dict[str, Any], folder: Path) -> Path:
    """Writes the figures as JSON into `folder`/data and returns the path."""
    stamp = result["provenance"]["utc"].replace(":", "").replace("-", "").replace("+0000", "Z")
    path = folder / "data" / f"data-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path


@contextmanager
def _folders(sizes: Sizes, scratch: Path | None, say: Callable[[str], object]) -> Iterator[tuple[Path, Path]]:
    """The same samples as shards of ours and as plain tars of webdataset."""
    needed = 2 * sizes.samples * sizes.sample_bytes
    base = Path(scratch or tempfile.gettempdir())
    free = shutil.disk_usage(base).free
    if free < needed * 1.1:
        raise WanmoeError(
            f"{base}: {free / 2**30:.1f} GiB are free, {needed / 2**30:.1f} are needed; "
            "give --scratch another folder or fewer --samples"
        )
    say(f"writing {sizes.samples} samples twice, {needed / 2**30:.2f} GiB, below {base}")
    with tempfile.TemporaryDirectory(dir=base, prefix="wanmoe-bench-") as folder:
        ours, plain = Path(folder) / "ours", Path(folder) / "plain"
        plain.mkdir()
        _write(sizes, ours, plain)
        yield ours, plain


def _write(sizes: Sizes, ours: Path, plain: Path) -> None:
    import webdataset

    generator = torch.Generator().manual_seed(0)
    pattern, shard_bytes = str(plain / "%06d.tar"), PER_SHARD * sizes.sample_bytes
    with (
        ShardWriter(ours, _HEAD, _HEAD, max_bytes=shard_bytes) as writer,
        webdataset.ShardWriter(pattern, maxsize=shard_bytes, mtime=0, verbose=0) as tars,
    ):
        for number in range(sizes.samples):
            latent = torch.randn(16, *sizes.latent, generator=generator).bfloat16()
            text = torch.randn(sizes.tokens, sizes.width, generator=generator).bfloat16()
            key, meta = f"clip_{number:06d}", {"caption": "random", "instruments": []}
            writer.add(key, "train", latent, text, meta)
            tars.write(
                {
                    "__key__": key,
                    "latent.safetensors": save({"latent": latent}),
                    "text.safetensors": save({"context": text}),
                    "json": json.dumps(meta).encode(),
                }
            )


def _ours(shards: ShardDataset | ShardStream, workers: int, samples: int) -> Iterable[Tensor]:
    batches = TrainBatches(
        shards,
        LabelGates(ExpertSet(), RouterConfig(), needed=False),
        batch=1,
        accumulation=1,
        rank=0,
        world=1,
        seed=0,
        balanced=False,
        workers=workers,
    )
    return (batch.latent for batch in batches(0, samples))


def _plain(folder: Path, workers: int) -> Iterable[Tensor]:
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).map(_decode)
    loader: Iterable[tuple[Tensor, Tensor]] = DataLoader(stream, batch_size=None, num_workers=workers)
    return (latent for latent, _ in loader)


def _decode(sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    latent = load(sample["latent.safetensors"])["latent"]
    return latent[None], load(sample["text.safetensors"])["context"]


def _time(open_reader: Callable[[], Iterable[Tensor]], samples: int) -> tuple[float, float]:
    began = time.perf_counter()
    count, first = 0, began
    for latent in open_reader():
        float(latent.flatten()[0])
        count += 1
        if count == 1:
            first = time.perf_counter()
    if count != samples:
        raise WanmoeError(f"bench data: a reader gave {count} of {samples} samples")
    return first - began, samples / (time.perf_counter() - began)


def _touch(folder: Path, *, cold: bool) -> None:
    """Takes the files out of this system's page cache, or reads them all into it."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(2**24):
                    pass
