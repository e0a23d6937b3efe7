"""The one-go run on a card: its steps, their logs and shares of the time, and what it says without a card."""

import os
import re
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from wanmoe.kernels.bench import gpu

ROOT = Path(__file__).resolve().parents[3]
ENDLESS = (sys.executable, "-c", "while True: pass")
NEEDS_MORE = {"tests/train/data/test_prepare.py"}
"""GPU tests that are left out: they want more packages than the benchmark."""


def says(text):
    return (sys.executable, "-c", f"print({text!r})")


def test_each_step_has_its_log_and_a_failure_does_not_stop_the_next(tmp_path, capfd):
    wanted = [
        gpu.Step("first", (sys.executable, "-c", "import os; print('says', os.environ['WORD'])"), 60),
        gpu.Step("broken", (sys.executable, "-c", "import sys; print('why'); sys.exit(3)"), 60),
        gpu.Step("asking", (sys.executable, "-c", "print('begins', flush=True); input()"), 60),
        gpu.Step("lacking", says("never"), 60, ("os", "no_such_module", "nor_this")),
        gpu.Step("last", says("end"), 60),
    ]
    outcomes = gpu.run_steps(wanted, tmp_path, {"WORD": "hello"}, tmp_path)
    assert [(o.name, o.code) for o in outcomes] == [
        ("first", 0), ("broken", 3), ("asking", 1), ("lacking", 0), ("last", 0),
    ]  # fmt: skip
    assert (tmp_path / "first.log").read_text() == "says hello\n"
    assert (tmp_path / "broken.log").read_text() == "why\n"
    assert outcomes[3].note == "skipped: needs no_such_module, nor_this"
    said = capfd.readouterr().out
    assert "says hello" in said and "exit code 3" in said and "lacking: skipped" in said


def test_a_slow_step_is_cut_so_that_later_ones_keep_their_share_and_unused_time_rolls_over(tmp_path, capfd):
    wanted = [
        gpu.Step("short", says("done"), 1.0),
        gpu.Step("slow", ENDLESS, 0.1),
        gpu.Step("stubborn", ("sh", "-c", "trap '' INT; while :; do :; done"), 0.3),
        gpu.Step("last", says("end"), 50),
    ]
    short, slow, stubborn, last = gpu.run_steps(wanted, tmp_path, {}, tmp_path, total_s=51.6, grace_s=0.1)
    assert [o.code for o in (short, slow, stubborn, last)] == [0, 124, 124, 0]
    assert short.limit_s == pytest.approx(1.2, abs=0.01)
    # The first had 1.2 s and took less: what it left is added to the share of 0.1 s.
    assert slow.limit_s == pytest.approx(1.3 - short.seconds, abs=0.1)
    assert slow.seconds == pytest.approx(slow.limit_s, abs=0.15)
    # Nothing was left over, so that each has just its share, the one behind a step that would not end too.
    assert 0.1 < stubborn.limit_s < 0.45 and last.limit_s == pytest.approx(50, abs=0.2)
    assert "stopped at its limit" in capfd.readouterr().out


def test_an_interrupted_step_can_write_what_it_has_and_its_processes_end_with_it(tmp_path):
    child = f"p = subprocess.Popen({list(ENDLESS)!r})\n    print(p.pid, flush=True)\n    p.wait()"
    ends = f"import subprocess\ntry:\n    {child}\nexcept KeyboardInterrupt:\n    print('kept', flush=True)\n"
    (outcome,) = gpu.run_steps(
        [gpu.Step("cut", (sys.executable, "-c", ends), 1)], tmp_path, {}, tmp_path, total_s=9, grace_s=4
    )
    pid, word = (tmp_path / "cut.log").read_text().split()
    assert outcome.code == 124 and outcome.seconds < 8 and word == "kept"
    with suppress(ProcessLookupError):
        assert select.select([os.pidfd_open(int(pid))], [], [], 10)[0], "it still runs"


def test_the_shares_fit_into_the_total_and_the_total_below_eight_minutes(tmp_path):
    wanted = gpu.steps(tmp_path)
    assert [step.name for step in wanted] == ["build", "tests", "tune", "linear", "block", "engine", "ring"]
    assert sum(step.least_s for step in wanted) <= gpu.TOTAL_S < 8 * 60
    assert all(step.least_s > gpu.GRACE_S for step in wanted)


@pytest.mark.skipif(bool(gpu._missing(gpu.BLOCK_NEEDS)), reason="needs the packages of the block")
def test_the_tests_step_runs_every_gpu_test_but_those_that_are_named(tmp_path):
    marked = re.compile(r"\bmark\.gpu\b")
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path != Path(__file__) and marked.search(path.read_text(encoding="utf-8"))
    ]
    assert set(files) >= NEEDS_MORE
    step = next(step for step in gpu.steps(tmp_path) if step.name == "tests")
    every = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    every = (*every, *(file for file in files if file not in NEEDS_MORE))
    runs = [
        subprocess.Popen((*command, "--collect-only"), stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for command in (step.command, every)
    ]
    found, wanted = ({line for line in run.communicate()[0].splitlines() if "::" in line} for run in runs)
    assert found == wanted and {node.split("/")[1] for node in found} == {
        "kernels",
        "csrc",
        "launch",
        "moe_lora",
    }


def test_the_wheels_that_a_step_needs_are_in_the_makefile():
    target = re.search(r"^gpu-wheels:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wheels = set(target[1].replace("\\\n", " ").split())
    assert {name.replace("_", "-") for name in (*gpu.BLOCK_NEEDS, *gpu.RING_NEEDS)} <= wheels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_one_line_and_code_2(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device")
    assert not (tmp_path / "out").exists()
