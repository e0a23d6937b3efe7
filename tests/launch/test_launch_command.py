"""`wanmoe launch OPTIONS train`, and presets of machines."""

from pathlib import Path

import pytest

from wanmoe.launch import cli, train
from wanmoe.launch.config import load_config
from wanmoe.moe_lora import WanmoeError

PRESETS = Path(train.__file__).parent / "presets"
MACHINES = sorted(path.stem for path in (PRESETS / "machines").glob("*.toml"))


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(
        '[model]\ndit = "w"\n[data]\nshards = "s"\n[train]\nstage = "a"\nrun = "r"\n[launch]\nranks = 3\n'
    )
    return path


def launched(monkeypatch, *words):
    """(section `launch`, words of the ranks) of a command line."""
    found = []
    monkeypatch.setattr("wanmoe.launch.preflight.preflight", lambda config: None)
    monkeypatch.setattr(train, "launch", lambda section, words: found.append((section, words)) or 0)
    monkeypatch.setattr("sys.argv", ["wanmoe", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    return found[0]


def test_options_are_keys_of_the_section(toml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node-a slots=2\nnode-b slots=2\n")
    options = ["--hostfile", "hosts", "--no-ssh", "--node_rank", 1, "--include", "node-a:0@node-b"]
    options += ["--master-addr", "10.0.0.1", "--master-port", 4000, "--ranks", 7, "--restarts", 2]
    section, words = launched(monkeypatch, "launch", *options, "train", "--config", toml)
    assert section.model_dump(exclude_unset=True) == {
        "hostfile": tmp_path / "hosts",  # absolute: pdsh may come to another folder
        "no_ssh": True,
        "node_rank": 1,
        "include": "node-a:0@node-b",
        "master_addr": "10.0.0.1",
        "master_port": 4000,
        "ranks": 7,
        "restarts": 2,
    }
    # What the ranks read is the same.
    assert words[:3] == ["train", "--config", str(toml)]
    assert load_config(toml, words[3:]).launch == section


def test_a_key_behind_the_config_has_the_last_word(toml, monkeypatch):
    words = ["launch", "--ranks", 5, "train", "--config", toml, "--launch.ranks", 6]
    assert launched(monkeypatch, *words)[0].ranks == 6
    assert launched(monkeypatch, *words[:-2])[0].ranks == 5
    assert launched(monkeypatch, "train", "--config", toml)[0].ranks == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--no-ssh"], "launch.no_ssh needs launch.hostfile, the same on every node"),
        (["--slurm", "--hostfile", "hosts"], "give launch.hostfile or launch.slurm, not both"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(toml, monkeypatch, capsys, options, told):
    monkeypatch.setattr("sys.argv", ["wanmoe", "launch", *options, "train", "--config", str(toml)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and told in error


@pytest.mark.parametrize("stage", ["stage_a", "stage_b", "stage_c"])
@pytest.mark.parametrize("machine", MACHINES)
def test_every_machine_goes_with_every_stage(machine, stage):
    config = load_config(PRESETS / f"{stage}.toml", [], machine)
    assert config.train.precision == ("fp32" if machine == "cpu-2" else "bf16")
    assert config.launch.restarts == (0 if machine == "cpu-2" else 3)


def test_there_are_the_machines_that_the_docs_name():
    sizes = ("256x256x81", "512x512x81", "832x480x81")
    planned = [f"{card}gb-{size}" for card in (16, 24, 40, 80) for size in sizes]
    assert sorted([*planned, "4090-24g", "a100-40g", "a100-80g", "cpu-2"]) == MACHINES


def test_the_config_wins_over_the_machine_and_a_key_over_both(toml, tmp_path):
    machine = tmp_path / "ours.toml"
    machine.write_text('[launch]\nranks = 8\nrestarts = 1\n[train]\nprecision = "bf16"\nsteps = 9\n')
    config = load_config(toml, ["--train.steps", "4"], str(machine))
    assert (config.launch.ranks, config.launch.restarts) == (3, 1)
    assert (config.train.precision, config.train.steps) == ("bf16", 4)


def test_a_machine_that_is_none_names_those_there_are(toml):
    with pytest.raises(
        WanmoeError,
        match="--machine b200: no such preset or file; there are 16gb-256x256x81, .*4090-24g, .*a100",
    ):
        load_config(toml, [], "b200")


def test_the_ranks_get_the_machine(toml, monkeypatch):
    _, words = launched(monkeypatch, "launch", "train", "--config", toml, "--machine", "a100-80g")
    assert words == ["train", "--config", str(toml), "--machine", "a100-80g"]
    _, words = launched(monkeypatch, "train", "--config", toml, "--machine", "cpu-2", "--train.steps", "4")
    assert words == ["train", "--config", str(toml), "--machine", "cpu-2", "--train.steps", "4"]
