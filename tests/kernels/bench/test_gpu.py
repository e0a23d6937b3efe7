"""The one-go run on a card: its steps, their logs and limits, and what it says without a card."""

import sys

import pytest
import torch

from wanmoe.kernels.bench import gpu


def test_each_step_has_its_log_and_a_failure_does_not_stop_the_next(tmp_path, capfd):
    wanted = [
        gpu.Step("first", (sys.executable, "-c", "import os; print('says', os.environ['WORD'])"), 60),
        gpu.Step("broken", (sys.executable, "-c", "import sys; print('why'); sys.exit(3)"), 60),
        gpu.Step("endless", (sys.executable, "-c", "print('begins', flush=True); input()"), 60),
        gpu.Step("slow", (sys.executable, "-c", "while True: pass"), 0.5),
        gpu.Step("last", (sys.executable, "-c", "print('end')"), 60),
    ]
    outcomes = gpu.run_steps(wanted, tmp_path, {"WORD": "hello"}, tmp_path)
    assert [(o.name, o.code) for o in outcomes] == [
        ("first", 0), ("broken", 3), ("endless", 1), ("slow", 124), ("last", 0),
    ]  # fmt: skip
    assert (tmp_path / "first.log").read_text() == "says hello\n"
    assert (tmp_path / "broken.log").read_text() == "why\n"
    said = capfd.readouterr().out
    assert "says hello" in said and "stopped at its limit" in said and "exit code 3" in said


def test_the_limits_stay_below_eight_minutes(tmp_path):
    assert sum(step.limit_s for step in gpu.steps(tmp_path)) < 8 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_one_line_and_code_2(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device")
    assert not (tmp_path / "out").exists()
