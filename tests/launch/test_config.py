"""Configs: typed, nearest key named, overrides, paths relative to the file (trap A8)."""

from pathlib import Path

import pytest

from wanmoe.launch import config as module
from wanmoe.launch.config import check_key, load_config, load_experts, reference, valid_keys
from wanmoe.moe_lora import WanmoeError

GOOD = """
[model]
dit = "base.safetensors"
[data]
shards = "shards"
[train]
stage = "a"
run = "runs/a"
"""
PRESETS = sorted((Path(module.__file__).parent / "presets").glob("*.toml"))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(GOOD)
    return file


def test_defaults_and_paths(path, tmp_path):
    config = load_config(path)
    assert config.train.steps is None and config.adapter.rank_q == 8
    assert config.model.dit == tmp_path / "base.safetensors" and config.train.run == tmp_path / "runs" / "a"


def test_paths_of_the_command_line_are_those_of_the_shell_and_written_down_whole(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = load_config(path, ["--objective.classifier", "c.safetensors", "--train.run", "../run"])
    assert config.objective.classifier == tmp_path / "here" / "c.safetensors"
    assert config.train.run == tmp_path / "run"
    config = load_config(path, ["--objective.vae", "haar", "--data.shards", "https://host/shards"])
    assert config.objective.vae == "haar" and str(config.data.shards) == "https://host/shards"


def test_every_key_can_be_set_on_the_command_line(path):
    words = [
        "--train.steps",
        "7",
        "--optimizer.lr=1e-3",
        "--adapter.blocks",
        "last_4",
        "--train.stage",
        "b",
        "--train.train-router",
        "true",
    ]
    config = load_config(path, words)
    assert (config.train.steps, config.optimizer.lr, config.adapter.blocks) == (7, 1e-3, 4)
    assert config.train.train_router is True
    assert load_config(path, ["--deepspeed.config.wall_clock_breakdown", "true"]).deepspeed.config == {
        "wall_clock_breakdown": True
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nstep = 3", "unknown key 'train.step'; nearest is 'train.steps'"),
        ("[trian]\nsteps = 3", "unknown key 'trian'; nearest is 'train'"),
        ("[train]\nsteps = -1", "train.steps: Input should be greater than or equal to 1 (got -1)"),
        ("[train]\nstage = 'd'", "train.stage: Input should be 'pretrain', 'a', 'b' or 'c' (got 'd')"),
        ("[train]\nsteps = 3\nepochs = 2", "train: give train.steps or train.epochs, not both"),
        ("[train]\nfreeze_base = true", "train: train.train_router and train.freeze_base are for stage b"),
        (
            "[train]\nearly_stop = 'val/loss'",
            "train: train.early_stop needs validations: set train.val_every",
        ),
        (
            "[objective]\ntemporal_on = 'lpips'",
            'objective: objective.temporal_on = "lpips" needs its weights',
        ),
        (
            "[objective]\ntemporal_on = 'pixels'",
            'objective.temporal_on = "pixels" needs a codec: objective.vae',
        ),
        ("[router]\nmax_gate = 0.4", "router: router.max_gate = 0.4 leaves less than 1 for 2 experts"),
        ("[router]\nbands = [[0.5, 1.0]]", "router.bands: bands must start at t = 0 and rise"),
        ("[model]\npreset = 'tiny'\ndit = 'x'", "model: give exactly one of model.dit"),
        ("[adapter]\nrank_q = 'eight'", "adapter.rank_q: Input should be a valid integer"),
    ],
)
def test_wrong_configs_are_one_line_that_names_the_key(tmp_path, text, words):
    tables = {"model": "dit = 'b'", "data": "shards = 's'", "train": "run = 'r'\nstage = 'a'"}
    section, _, body = text.partition("]\n")
    given = section[1:]
    if given in tables:
        kept = [line for line in tables[given].split("\n") if line.split(" ")[0] not in body]
        tables[given] = "\n".join([*kept, body]) if given != "model" else body
    else:
        tables[given] = body
    file = tmp_path / "bad.toml"
    file.write_text("\n".join(f"[{name}]\n{lines}" for name, lines in tables.items()))
    with pytest.raises(WanmoeError) as caught:
        load_config(file)
    assert words in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_sections_and_broken_toml(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("[model]\ndit = 'x'\n")
    with pytest.raises(WanmoeError, match="key 'data' is missing"):
        load_config(file)
    file.write_text("[model\n")
    with pytest.raises(WanmoeError, match="not valid TOML"):
        load_config(file)
    with pytest.raises(WanmoeError, match="cannot read the config"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.step", "3"], "unknown config key 'train.step'; nearest is 'train.steps'"),
        (["--train.steps"], "--train.steps needs a value"),
        (["steps", "3"], "unexpected argument 'steps'"),
        (["--deepspeed.config.bf16.enabled", "1", "--deepspeed.config.bf16.enabled.x", "1"], "is a value"),
    ],
)
def test_wrong_overrides(path, words, message):
    with pytest.raises(WanmoeError, match=message):
        load_config(path, words)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid(preset):
    config = load_config(preset)
    assert config.train.stage == preset.stem[-1]


def test_the_reference_in_the_docs_is_that_of_the_schema():
    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == reference()


def test_every_key_is_accepted_on_the_command_line():
    assert PRESETS and len(valid_keys()) > 50
    for key in valid_keys():
        check_key(key)


def test_custom_experts(tmp_path):
    file = tmp_path / "experts.toml"
    file.write_text(
        '[adapter]\nfallback = "milk"\nexperts = [{name = "milk"}, {name = "tea", keywords = ["茶"]}]\n'
    )
    experts = load_experts(file)
    assert (
        experts.names == ["milk", "tea"] and experts.fallback == "milk" and experts.find("茶") == {"tea": 1}
    )
