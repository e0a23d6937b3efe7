"""The command as a user meets it: its options, and one clear line for all that can be wrong (trap A28)."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from wanmoe.launch import cli, generate
from wanmoe.moe_lora import AdapterConfig, WanmoeError, attach, save_adapter
from wanmoe.moe_lora.video import read_metadata, read_video, write_video
from wanmoe.moe_lora.wan import codec, text
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import save_dit
from wanmoe.train.synth import synth_clips

# Names that users and scripts rely on; a new option is added here, one that goes is a break.
OPTIONS = {
    "synth": "out clips val size frames seed instruments background",
    "clips": "out videos format times video frames fps seconds experts val-fraction seed licence",
    "prepare": "clips cache out vae text tokenizer size frames fps stride val-fraction task experts "
    "router-prompts seed device ranks",
    "data": "",
    "data verify": "",
    "data repair": "apply",
    "data stats": "json",
    "data show": "out vae split samples key any-codec device",
    "train": "config machine",
    "launch": "hostfile no-ssh node-rank slurm include master-addr master-port ranks restarts",
    "launch train": "config machine",
    "launch doctor": "config fake",
    "plan": "config machine generate card fit pcie host ranks model size frames clips out",
    "train-classifier": "shards out config space vae steps batch lr seed device",
    "train-detector": "shards out steps batch lr seed device",
    "track-sync": "run",
    "validate": "dit shards adapter wrong-expert out",
    "evaluate": "real generated run out classifier detector vae lpips features start steps track blind pairs "
    "question tally key seed device",
    "ablate": "out rows seeds jobs track dry device",
    "report": "out title",
    "generate": "prompt prompts model dit dit-high-noise vae text t5 tokenizer clip task output-path "
    "lora-moe-weights lora-moe-config-file fold-timestep lora instrument-hint mix schedule ema "
    "image-path last-image-path num-frames video-size num-steps guidance-scale "
    "guidance-scale-high-noise flow-shift solver sample-solver negative-prompt alpha-base "
    "alpha-expert seed device dtype merged compile stream quantised vae-tiling any-base classifier",
    "convert": "to out instrument mix alpha-base alpha-expert rank dit dit-high-noise any-base base config "
    "lora-moe-config-file fold-timestep noise-expert dtype",
    "inspect": "json hash lora-moe-config-file",
    "demo": "out clips ranks seed",
    "bench": "suite rows variants out device",
    "bench block": "tokens preset compiled out device",
    "bench ring": "out device",
    "bench data": "samples latent tokens workers rounds scratch out",
    "bench engine": "parts ranks quick out device",
    "bench tune": "linears tokens",
    "bench resources": "archs out",
}


def run(monkeypatch, capsys, *words):
    """(exit code, last line on standard error) of `wanmoe words`."""
    monkeypatch.setattr(sys, "argv", ["wanmoe", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    lines = capsys.readouterr().err.strip().splitlines() or [""]
    return stop.value.code, lines[-1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Clips, shards, a tiny base and an adapter, made by the commands themselves where there is one."""
    root = tmp_path_factory.mktemp("work")
    synth_clips(root / "clips", clips=4, val=4, height=32, width=32, frames=5)
    arguments = ["--vae", "haar", "--text", "hash", "--size", "32", "32", "--frames", "5"]
    words = [
        sys.executable,
        "-m",
        "wanmoe.launch",
        "prepare",
        "--clips",
        root / "clips",
        "--out",
        root / "shards",
    ]
    subprocess.run([*words, *arguments], check=True, capture_output=True)
    dit = WanDiT(WanConfig.preset("tiny"))
    save_dit(dit, root / "base.safetensors")
    save_adapter(attach(dit, AdapterConfig(blocks=2)), root / "adapter.safetensors", stage="b", step=1)
    imported = attach(
        WanDiT(WanConfig.preset("tiny")), AdapterConfig(blocks=2, base_ranks={"blocks.0.self_attn.q": 3})
    )
    save_adapter(imported, root / "imported.safetensors", stage="a", step=0)
    (root / "a.toml").write_text(
        '[model]\ndit = "base.safetensors"\n[data]\nshards = "shards"\n[train]\nstage = "a"\nrun = "run"\n'
    )
    return root


def test_the_command_line_is_frozen():
    def commands(group, prefix=""):
        for name, command in group.commands.items():
            yield prefix + name, command
            yield from commands(command, f"{name} ") if hasattr(command, "commands") else ()

    found = {
        name: {
            word.removeprefix("--")
            for option in command.params
            for word in option.opts
            if word.startswith("--") and word != "--help"
        }
        for name, command in commands(typer.main.get_command(cli.app))
    }
    assert found == {name: set(words.split()) for name, words in OPTIONS.items()}


def test_underscores_and_dashes_are_the_same(monkeypatch, capsys, work):
    common = ("--dit", work / "base.safetensors", "--vae", "haar", "--text", "hash", "--prompt", "hook")
    for flag in ("--num_frames", "--num-frames"):
        code, line = run(monkeypatch, capsys, "generate", *common, flag, "6")
        assert code == 2 and "num_frames 6 must be 4n+1; nearest is 5" in line


def wrong_video(root, out):
    (out / "clip.mp4").write_bytes(b"not a video")
    (out / "clips.jsonl").write_text('{"video_path": "clip.mp4", "caption": "hook"}\n')
    return out / "clips.jsonl", ("clip.mp4",)


def broken_line(root, out):
    (out / "clips.jsonl").write_text('{"video_path": "a.mp4", "caption": "hook"}\n{"video_path": \n')
    return out / "clips.jsonl", ("clips.jsonl:2",)


def unknown_expert(root, out):
    write_video(out / "a.mp4", torch.zeros(5, 32, 32, 3, dtype=torch.uint8))
    row = {"video_path": "a.mp4", "caption": "x", "instruments": ["Scisors"]}
    (out / "clips.jsonl").write_text(json.dumps(row) + "\n")
    return out / "clips.jsonl", ("clips.jsonl:1", "Scisors", "Scissors")


@pytest.mark.parametrize("fault", [wrong_video, broken_line, unknown_expert])
def test_bad_clips_are_one_line_and_leave_nothing(monkeypatch, capsys, work, tmp_path, fault):
    clips, words = fault(work, tmp_path)
    arguments = ("--vae", "haar", "--text", "hash", "--size", "32", "32", "--frames", "5")
    code, line = run(
        monkeypatch, capsys, "prepare", "--clips", clips, "--out", tmp_path / "shards", *arguments
    )
    assert code == 2 and line.startswith("wanmoe: error: ") and all(word in line for word in words), line
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".mp4", ".jsonl")]


def cut_shard(work, tmp_path):
    shard = next((work / "shards").glob("train-*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    return [], (shard.name, "cut short"), lambda: shard.write_bytes(whole)


TRAIN_FAULTS = {
    "unknown key": (["--train.step", "3"], ("train.step", "train.steps")),
    "no base": (["--model.dit", "none.safetensors"], ("none.safetensors", "does not exist")),
    "adapter missing": (["--train.stage", "c"], ("model.adapter is missing", "stage b")),
    "base adapter missing": (
        ["--train.stage", "b", "--train.freeze_base", "true"],
        ("model.adapter is missing", "stage a", "without train.freeze_base"),
    ),
    "base of an import": (
        ["--train.stage", "b", "--model.adapter", "{work}/imported.safetensors"],
        ("blocks.0.self_attn.q", "without experts", "train.freeze_base = true"),
    ),
    "router not learned": (
        ["--train.stage", "c", "--model.adapter", "{work}/adapter.safetensors"],
        ("router.mode", "learned"),
    ),
    "wrong checkpoint": (
        ["--train.stage", "b", "--model.adapter", "{work}/base.safetensors"],
        ("base.safetensors", "not a wanmoe adapter"),
    ),
    "adapter as base": (["--model.dit", "{work}/adapter.safetensors"], ("is an adapter", "model.adapter")),
    "labels of other experts": (
        ["--adapter.experts", '[{{name = "milk"}}]'],
        ("unknown expert", "milk", "adapter.experts"),
    ),
    "no shards": (["--data.shards", "nowhere"], ("nowhere", "wanmoe prepare")),
}


@pytest.mark.parametrize("name", TRAIN_FAULTS)
def test_bad_training_input_is_one_line_before_any_process_starts(monkeypatch, capsys, work, name):
    words, expected = TRAIN_FAULTS[name]
    words = [word.format(work=work) for word in words]
    code, line = run(monkeypatch, capsys, "train", "--config", work / "a.toml", *words)
    assert code == 2 and line.startswith("wanmoe: error: ") and all(word in line for word in expected), line
    assert not (work / "run").exists()


def test_a_shard_cut_short_is_named_by_train_and_by_verify(monkeypatch, capsys, work, tmp_path):
    _, expected, mend = cut_shard(work, tmp_path)
    code, line = run(monkeypatch, capsys, "train", "--config", work / "a.toml")
    assert code == 2 and all(word in line for word in expected), line
    code, _ = run(monkeypatch, capsys, "data", "verify", work / "shards")
    assert code == 1
    mend()
    code, _ = run(monkeypatch, capsys, "data", "verify", work / "shards")
    assert code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--instrument_hint", "Scisors"], ("unknown expert 'Scisors'", "Scissors")),
        (["--mix", "Scissors"], ("--mix 'Scissors'", "NAME=WEIGHT")),
        (["--video_size", "100", "96"], ("100x96", "nearest is 96x96")),
        (["--image_path", "x.png"], ("x.png", "t2v model takes no image")),
        (["--schedule", "0:Hook, 5:Suction"], ("frame 5", "last frame is 4")),
        (["--schedule", "Hook"], ("'Hook' is no FRAME:EXPERT",)),
        (["--guidance_scale_high_noise", "3"], ("needs --guidance_scale",)),
        (["--prompts", "x.txt"], ("--prompt TEXT or --prompts FILE",)),
        (["--lora", "absent.safetensors:0.5"], ("absent.safetensors",)),
        (["--model", "{work}/absent"], ("absent: no such folder",)),
        (["--solver", "ddim"], ("ddim", "unipc")),
        (["--dtype", "bf61"], ("--dtype 'bf61'", "nearest is 'bf16'", "fp32, bf16, file")),
        (["--device", "gpu"], ("--device 'gpu'", "cpu, cuda or cuda:N")),
        (["--device", "mps"], ("--device 'mps'", "cpu, cuda or cuda:N")),
        (["--device", "cuda:99"], ("--device 'cuda:99' is not there", "give cpu")),
        (["--lora_moe_weights", "{work}/base.safetensors"], ("base.safetensors", "none of a LoRA")),
    ],
)
def test_bad_requests_are_one_line_and_write_no_video(monkeypatch, capsys, work, tmp_path, words, expected):
    words = [word.format(work=work) for word in words]
    if "--lora_moe_weights" not in words:
        words += ["--lora_moe_weights", str(work / "adapter.safetensors")]
    common = ("--dit", work / "base.safetensors", "--vae", "haar", "--text", "hash", "--prompt", "hook")
    target = ("--output_path", tmp_path / "out.mp4", "--num_frames", "5", "--num_steps", "1")
    size = () if "--video_size" in words else ("--video_size", "32", "32")
    code, line = run(monkeypatch, capsys, "generate", *common, *target, *size, *words)
    assert code == 2 and line.startswith("wanmoe: error: ") and all(word in line for word in expected), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "device", "expected"),
    [
        ([], "cpu", None),
        (["--dtype", "file"], "cpu", None),
        (["--dtype", "bf16"], "cpu", torch.bfloat16),
        (["--dtype", "fp32"], "cpu", torch.float32),
        ([], "cuda", torch.bfloat16),
        (["--dtype", "file"], "cuda", None),
    ],
)
def test_the_dtype_is_asked_for_or_said(monkeypatch, capsys, caplog, work, words, device, expected):
    """The pipeline is not run here: what it is given is looked at."""
    given = {}

    class Pipeline:
        def __init__(self, *_paths, **options):
            given.update(options)

        def prepare(self, _prompts):
            pass

        def generate(self, **_request):
            pass

    monkeypatch.setattr("wanmoe.infer.LoRAMoEInference", Pipeline)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(device == "cuda"))
    card(monkeypatch, 24)
    caplog.set_level("INFO", logger="wanmoe")
    common = ("--dit", work / "base.safetensors", "--vae", "haar", "--text", "hash", "--prompt", "hook")
    code, _ = run(monkeypatch, capsys, "generate", *common, *words)
    assert code == 0 and given["dtype"] is expected and given["device"] == torch.device(device)
    assert ("bf16, the default on cuda" in caplog.text) == (device == "cuda" and not words)


def card(monkeypatch, free):
    """A 4090 with so many GB that are free, as far as torch tells, in a host of 128."""
    memory = SimpleNamespace(available=128 * 10**9, total=128 * 10**9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_memory=25 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 10**9, 25 * 10**9))


@pytest.mark.parametrize(
    ("asked", "place", "sides", "free", "fixed", "expected"),
    [
        ("none", "cuda", 2, 24, False, None),
        ("12", "cuda", 2, 24, False, 12),
        ("12", "cpu", 2, 24, False, 12),
        ("auto", "cpu", 2, 24, False, None),
        ("auto", "cuda", 2, 24, True, None),
        ("auto", "cuda", 2, 23, False, 27),
        ("auto", "cuda", 2, 16, False, 32),
        ("auto", "cuda", 1, 16, False, 23),
        ("auto", "cuda", 1, 4, False, 40),
    ],
)
def test_as_many_blocks_stream_as_the_largest_request_needs(
    monkeypatch, asked, place, sides, free, fixed, expected
):
    """On a 4090 of A14B's sizes."""
    config = WanConfig.preset("t2v-A14B")
    monkeypatch.setattr("wanmoe.moe_lora.wan.weights.read_dit_config", lambda path: (config, "original"))
    card(monkeypatch, free)
    files = [Path("dit"), Path("high") if sides == 2 else None, Path("vae"), Path("text"), None, None]
    requests = [{"num_frames": 17, "video_size": (64, 64)}, {"num_frames": 81, "video_size": (256, 256)}]
    found = generate._stream(asked, None, torch.device(place), generate._Parts(*files), requests, fixed)
    assert found == expected


def test_a_host_without_room_for_what_streams_is_told(monkeypatch):
    config = WanConfig.preset("t2v-A14B")
    monkeypatch.setattr("wanmoe.moe_lora.wan.weights.read_dit_config", lambda path: (config, "original"))
    card(monkeypatch, 24)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**10, total=10**10))
    files = [Path("dit"), Path("high"), Path("vae"), Path("text"), None, None]
    requests = [{"num_frames": 81, "video_size": (256, 256)}]
    with pytest.raises(
        WanmoeError, match="nothing fits into 23.8 GB with 10 GB of the host: .*, or --quantised fp8"
    ):
        generate._stream("auto", None, torch.device("cuda"), generate._Parts(*files), requests, False)


def test_a_number_of_blocks_that_is_none_is_one_line(monkeypatch, capsys, work):
    common = ("--dit", work / "base.safetensors", "--vae", "haar", "--text", "hash", "--prompt", "hook")
    code, line = run(monkeypatch, capsys, "generate", *common, "--stream", "many")
    assert code == 2 and "--stream 'many': give a number of blocks, none or auto" in line


def test_bf16_generates_on_the_cpu(monkeypatch, capsys, work, tmp_path):
    common = ("--dit", work / "base.safetensors", "--vae", "haar", "--text", "hash", "--prompt", "hook")
    small = ("--num_frames", "5", "--num_steps", "2", "--video_size", "32", "32", "--seed", "1")
    more = ("--lora_moe_weights", work / "adapter.safetensors", "--device", "cpu")
    for dtype in ("bf16", "fp32"):
        target = ("--output_path", tmp_path / f"{dtype}.mp4", "--dtype", dtype)
        code, line = run(monkeypatch, capsys, "generate", *common, *small, *more, *target)
        assert code == 0, line
    low, full = (read_video(tmp_path / f"{dtype}.mp4").float() for dtype in ("bf16", "fp32"))
    assert full.std() > 1 and (low - full).abs().mean() < 8


def test_a_file_of_prompts_makes_a_video_of_each_with_one_model(monkeypatch, capsys, work, tmp_path):
    (tmp_path / "list.jsonl").write_text(
        '{"prompt": "hook"}\n'
        '{"prompt": "liver", "instrument_hint": "Suction", "num_frames": 9, "seed": 5, '
        '"output_path": "own.mp4"}\n'
        '{"prompt": "liver", "schedule": "0:Hook, 1:Suction"}\n'
    )
    common = ("--dit", work / "base.safetensors", "--vae", "haar", "--t5", "hash", "--mix", "Scissors=1")
    small = ("--num_frames", "5", "--num_steps", "1", "--video_size", "32", "32", "--seed", "1")
    more = ("--lora_moe_weights", work / "adapter.safetensors", "--output_path", tmp_path / "clip.mp4")
    code, line = run(
        monkeypatch, capsys, "generate", "--prompts", tmp_path / "list.jsonl", *common, *small, *more
    )
    assert code == 0, line
    made = {path.name: read_metadata(path) for path in tmp_path.glob("*.mp4")}
    assert made.keys() == {"clip-001.mp4", "own.mp4", "clip-003.mp4"}
    sources = {name: json.loads(about["gates"])["low"]["source"] for name, about in made.items()}
    assert sources == {"clip-001.mp4": "mix", "own.mp4": "hint", "clip-003.mp4": "schedule"}
    assert len(read_video(tmp_path / "own.mp4")) == 9 and made["own.mp4"]["seed"] == "5"
    assert len(list(tmp_path.glob("*.gates.png"))) == 3


def test_a_bad_line_among_the_prompts_stops_before_any_video(monkeypatch, capsys, work, tmp_path):
    (tmp_path / "list.jsonl").write_text('{"prompt": "hook"}\n{"prompt": "hook", "num_frames": 6}\n')
    monkeypatch.setattr("wanmoe.infer.LoRAMoEInference", lambda *_a, **_b: pytest.fail("the model was read"))
    common = ("--dit", work / "base.safetensors", "--vae", "haar", "--text", "hash")
    words = ("--prompts", tmp_path / "list.jsonl", "--output_path", tmp_path / "x.mp4")
    code, line = run(monkeypatch, capsys, "generate", *common, *words)
    assert code == 2 and "num_frames 6 must be 4n+1" in line


def test_a_model_folder_gives_what_is_not_named(monkeypatch, capsys, work, tmp_path):
    given = {}

    class Pipeline:
        def __init__(self, task, dit, **options):
            given.update(options, task=task, dit=dit)

        def prepare(self, _prompts):
            pass

        def generate(self, **_request):
            pass

    monkeypatch.setattr("wanmoe.infer.LoRAMoEInference", Pipeline)
    for side in ("low", "high"):
        (tmp_path / f"{side}_noise_model").mkdir()
        save_dit(WanDiT(WanConfig.preset("tiny")), tmp_path / f"{side}_noise_model" / "x.safetensors")
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    words = ("--model", tmp_path, "--prompt", "hook")
    code, line = run(monkeypatch, capsys, "generate", *words)
    assert code == 2 and "--text must be given" in line and str(tmp_path) in line
    code, line = run(
        monkeypatch, capsys, "generate", *words, "--t5", "hash", "--output_path", tmp_path / "x.mp4"
    )
    assert code == 0, line
    assert given["dit"] == tmp_path / "low_noise_model" and given["task"] is None
    assert given["dit_high_noise_path"] == tmp_path / "high_noise_model"
    assert given["vae_path"] == tmp_path / "Wan2.1_VAE.pth"
    code, line = run(
        monkeypatch, capsys, "generate", *words, "--t5", "hash", "--dit", work / "base.safetensors"
    )
    assert code == 0 and given["dit"] == work / "base.safetensors"
    assert given["dit_high_noise_path"] == tmp_path / "high_noise_model"


def test_prepare_hands_its_device_on(monkeypatch, capsys, work, tmp_path):
    places = {}

    def loader(name, real):
        def load(path, **options):
            places[name] = options["device"]
            return real(path, **(options | {"device": "cpu"}))

        return load

    for name, module in (("load_vae", codec), ("load_text_encoder", text)):
        monkeypatch.setattr(module, name, loader(name, getattr(module, name)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = (
        "--clips",
        work / "clips",
        "--vae",
        "haar",
        "--text",
        "hash",
        "--size",
        "32",
        "32",
        "--frames",
        "5",
    )
    # Without --device, two cards are two ranks: tests/launch/test_prepare.py.
    for words, device in ((("--device", "cuda:1"), "cuda:1"), (("--device", "cpu"), "cpu")):
        code, line = run(monkeypatch, capsys, "prepare", *arguments, "--out", tmp_path / "shards", *words)
        assert code == 0, line
        assert places == dict.fromkeys(("load_vae", "load_text_encoder"), torch.device(device))


def test_validate_writes_its_figures_or_says_at_once_that_it_cannot(monkeypatch, capsys, work, tmp_path):
    common = ("--dit", work / "base.safetensors", "--shards", work / "shards")
    code, _ = run(monkeypatch, capsys, "validate", *common, "--out", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert code == 0 and figures["loss"] > 0 and figures["clips"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    monkeypatch.setattr("wanmoe.train.evaluate.evaluate_files", lambda *_: pytest.fail("computed in vain"))
    target = tmp_path / "nowhere" / "figures.json"
    code, line = run(monkeypatch, capsys, "validate", *common, "--out", target)
    assert code == 2 and f"--out {target}: the folder" in line and "does not exist" in line


@pytest.mark.parametrize("command", ["synth", "prepare", "generate"])
def test_no_space_left_is_one_line_and_leaves_nothing(work, tmp_path, command):
    """A file size limit stands in for the full disk: the write really fails, half-way."""
    haar = ["--vae", "haar", "--text", "hash"]
    small = ["--size", "32", "32", "--frames", "5"]
    clip = ["--video_size", "96", "96", "--num_frames", "17", "--num_steps", "1", "--prompt", "hook"]
    clip += ["--output_path", "out/video.mp4"]
    words = {
        "synth": ["synth", "--out", "out/clips", "--clips", "2", "--val", "1", "--size", "96", "96"],
        "prepare": ["prepare", "--clips", work / "clips", "--out", "out/shards", *haar, *small],
        "generate": ["generate", "--dit", work / "base.safetensors", *haar, *clip],
    }[command]
    (tmp_path / "out").mkdir()
    quoted = " ".join(f"'{word}'" for word in [sys.executable, "-m", "wanmoe.launch", *words])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 4; {quoted}"], cwd=tmp_path, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr[-2000:]
    assert last.startswith("wanmoe: error: ") and "out/" in last and "File too large" in last
    assert "Traceback" not in done.stderr
    # What prepare has finished stays for the next try, in a folder of its own beside the one asked for.
    kept = {"shards.work"} if command == "prepare" else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept
