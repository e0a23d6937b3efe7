"""`wanmoe report`: what it takes from a folder."""

import json
import sys
from pathlib import Path

import pytest

from wanmoe.infer.run_report import AblationPart, RunPart
from wanmoe.launch import cli
from wanmoe.launch.ablation_table import write_result
from wanmoe.launch.report import curve, parts_of
from wanmoe.moe_lora import WanmoeError

CONFIG = '[model]\npreset = "tiny"\n[data]\nshards = "s"\n[train]\nstage = "pretrain"\nrun = "."\nsteps = 2\n'


def ablation(folder: Path) -> None:
    def row(value: float) -> dict[str, object]:
        return {"figures": {"loss": {"value": value, "each": [value] * 4}, "parameters": {"value": 5.0}}}

    result = {
        "format": "wanmoe-ablation/1",
        "name": "small",
        "reference": "one",
        "seeds": [0],
        "figures": ["parameters", "loss"],
        "axes": {"one": "", "two": "floor"},
        "rows": {"one": {0: row(1.0)}, "two": {0: row(1.5)}},
        "commits": ["abcdef0123456789"],
        "failed": {},
    }
    write_result(result, folder)


def test_a_folder_is_what_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    lines = [{"step": 0, "val/loss": 1.0}, {"step": 2, "train/loss": 0.9, "train/diffusion": 0.8}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ablation(tmp_path)
    run, found = parts_of(tmp_path)
    assert isinstance(run, RunPart) and run.facts["stage"] == "pretrain" and run.facts["steps"] == "2"
    assert run.curves[""].train == [0.8] and run.curves[""].val == [1.0] and list(run.curves) == [""]
    assert isinstance(found, AblationPart) and found.head == ["row", "trained parameters", "held-out loss"]
    assert found.rows[1][0] == "floor: two"
    better, (dot,) = found.differences["held-out loss"]
    assert better == "lower" and (dot.label, dot.group, dot.value) == ("two", "floor", 0.5)
    assert "trained parameters" not in found.differences
    with pytest.raises(WanmoeError, match=r"no config.toml of a run, evaluation.json, tally.json or abl"):
        parts_of(tmp_path / "nowhere")


def test_curves_of_both_noise_experts() -> None:
    lines = [{"step": 1, "high/train/loss": 1.0}, {"step": 2, "low/train/loss": 2.0, "low/val/loss": 3.0}]
    assert curve(lines, "high/").train == [1.0] and curve(lines, "low/").val == [3.0]
    assert curve(lines).steps == []


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation(tmp_path)

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["wanmoe", "report", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr()
        return int(stop.value.code or 0), told.out + told.err

    code, text = run(tmp_path)
    assert code == 0 and "report.html: ablation small" in text
    assert "Ablation: small" in (tmp_path / "report.html").read_text(encoding="utf-8")
    code, text = run(tmp_path, "--out", tmp_path / "x.txt")
    assert code == 2 and "give an .html file in a folder that is there" in text
    (tmp_path / "evaluation.json").write_text("{}")
    code, text = run(tmp_path)
    assert code == 2 and "not an evaluation of this version" in text
