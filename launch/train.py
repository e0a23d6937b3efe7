"""What `wanmoe train` does: one command for whoever types it and for the ranks that it starts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from ..moe_lora.errors import WanmoeError
from . import slurm
from .config import Config, load_config
from .launcher import STOPS, launch, under_launcher


def start(path: Path, overrides: Sequence[str], machine: str | None) -> None:
    """Trains as a rank where a launcher started this process, else checks the config and starts the ranks.

    Raises:
        WanmoeError: what can be found wrong before anything starts.
    """
    config = load_config(path, overrides, machine)
    slurm.take_place()
    if under_launcher():
        # Our readers open files by themselves; nothing else of webdataset in a rank shall run a shell for a
        # URL or unpickle. For ranks alone: a program that imports this package may use it as it likes.
        os.environ.setdefault("WDS_SECURE", "1")
        import torch

        from ..train.loop import train

        try:
            train(config)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(config, error) from error
        finally:
            # All is written; the end of the interpreter takes seconds, in which a signal would make it a
            # failure.
            for number in STOPS:
                signal.signal(number, signal.SIG_IGN)
        return
    from .preflight import preflight

    preflight(config)
    preset = [] if machine is None else ["--machine", machine]
    words = ["train", "--config", str(path), *preset, *overrides]
    raise typer.Exit(launch(config.launch, words))


def _out_of_memory(config: Config, error: Exception) -> WanmoeError:
    """Says where the memory of the card went, on standard error, and what to try."""
    import torch

    from .plan import out_of_memory

    device = torch.device("cuda", torch.cuda.current_device())
    first = str(error).split(". ")[0]
    try:
        plan, advice = out_of_memory(config, device, int(os.environ.get("WORLD_SIZE", "1")))
    except WanmoeError:  # a stage or a job that has no plan
        return WanmoeError(f"{first}; take a smaller data.batch, train.checkpointing = true or a larger card")
    sys.stderr.write(f"\n{plan}\n")
    return WanmoeError(f"{first}; {advice}")
