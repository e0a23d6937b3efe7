"""Training under the real deepspeed launcher: ZeRO-3, two gloo ranks, resume (traps A1, A7, B3, B6)."""

import json
import math
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wanmoe.moe_lora import AdapterConfig, import_adapter, save_adapter
from wanmoe.moe_lora.adapter_file import read_adapter
from wanmoe.moe_lora.lora_file import write_lora
from wanmoe.moe_lora.wan.weights import load_dit
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.tracking import read_metrics

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STAND_IN = {"name": "test", "fingerprint": "0" * 64, "stand_in": True}


def losses(run):
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


@pytest.fixture(scope="module")
def stages(launcher, ranks, shards, base, tmp_path_factory):
    """Stages a, b, c, each from the file of the one before, on two ranks; shared by the tests below."""
    root = tmp_path_factory.mktemp("stages")
    outputs = {}
    for stage, before in (("a", None), ("b", "a"), ("c", "b")):
        tree = {
            "model": {"dit": str(base)}
            | ({"adapter": str(root / before / "adapter.safetensors")} if before else {}),
            "data": {"shards": str(shards), "batch": 1},
            "objective": {"identity": 0},
            "optimizer": {"lr": 1e-2, "warmup_steps": 2},
            "train": {
                "stage": stage,
                "run": str(root / stage),
                "steps": 6,
                "log_every": 1,
                "save_every": 3,
                "keep": 9,
            },
            "deepspeed": {"zero": 3},
            "tracking": {"enabled": stage == "a"},
            "launch": {"ranks": 2},
        }
        if stage == "a":
            tree["adapter"] = {"blocks": 2, "ffn_blocks": 1}
        if stage == "c":
            tree["router"] = {"mode": "learned"}
        said = launcher.run(tree, root / "a.toml") if stage == "a" else ranks.run(tree)
        outputs[stage] = (tree, said)
    return root, outputs


def test_each_stage_changes_its_own_part_and_keeps_the_rest_bit_equal(stages):
    root, _ = stages
    files = {stage: read_adapter(root / stage / "adapter.safetensors")[1] for stage in ("a", "b", "c")}
    for before, after, parts in (("a", "b", (".base_", ".expert_")), ("b", "c", ("router.",))):
        for name, value in files[after].items():
            if any(part in name for part in parts):
                assert name not in files[before] or not torch.equal(value, files[before][name]), name
            else:
                assert torch.equal(value, files[before][name]), name
    assert all(value.any() for name, value in files["a"].items() if "base_" in name)
    assert not any(value.any() for name, value in files["a"].items() if name.endswith("expert_up"))
    assert all(value.any() for name, value in files["c"].items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shared buffers are those of the CPU collectives")
def test_no_shared_memory_outlives_a_job(launcher, stages, tmp_path):
    tree = stages[1]["a"][0] | {"tracking": {"enabled": False}}
    port = launcher.free_port()
    tree["launch"] = {"ranks": 2, "master_port": port}
    tree["train"] = tree["train"] | {"run": str(tmp_path / "run"), "steps": 1}
    launcher.run(tree, tmp_path / "config.toml")
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


def test_the_prefix_is_said_and_the_loss_falls(stages):
    root, outputs = stages
    assert "prefix 1 of 3 blocks without a graph" in outputs["a"][1]
    held_out = [line["val/loss"] for line in read_metrics(root / "a") if "val/loss" in line]
    assert held_out[-1] < held_out[0]


def test_saving_gathers_what_trains_and_nothing_frozen(stages, base):
    root, _ = stages
    newest = sorted((root / "b" / "resume").iterdir())[-1]
    state = load_file(newest / "state.safetensors")
    frozen = set(load_dit(base).state_dict())
    names = {name.split("/", 1)[1] for name in state}
    assert names and not names & frozen
    assert all(".expert_" in name or ".base_" in name for name in names)
    assert {name.split("/")[0] for name in state} == {"param", "exp_avg", "exp_avg_sq"}
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_a_resumed_run_is_bit_equal_to_a_straight_one(ranks, stages, tmp_path):
    root, outputs = stages
    for stage in ("b", "c"):
        tree = json.loads(json.dumps(outputs[stage][0]))
        run = tmp_path / stage
        shutil.copytree(root / stage, run)
        shutil.rmtree(run / "resume" / "step_00000006")
        tree["train"]["run"] = str(run)
        output = ranks.run(tree)
        assert "at step 3" in output
        straight = load_file(root / stage / "resume" / "step_00000006" / "state.safetensors")
        resumed = load_file(run / "resume" / "step_00000006" / "state.safetensors")
        assert straight.keys() == resumed.keys()
        assert [n for n in straight if not torch.equal(straight[n], resumed[n])] == []
        assert losses(run) == losses(root / stage)


@pytest.mark.parametrize("stage", ["a", "c"])
def test_one_rank_and_two_forwards_train_like_two_ranks(ranks, stages, tmp_path, stage):
    """Gradients of adapters and of the router are averaged over the ranks (trap A7)."""
    root, outputs = stages
    tree = json.loads(json.dumps(outputs[stage][0]))
    tree["train"] |= {"run": str(tmp_path / "run"), "accumulation": 2}
    tree["launch"] = {"ranks": 1}
    tree["tracking"] = {"enabled": False}
    ranks.run(tree)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(root / stage), rtol=1e-5, atol=1e-6)
    one = read_adapter(tmp_path / "run" / "adapter.safetensors")[1]
    two = read_adapter(root / stage / "adapter.safetensors")[1]
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_two_nodes_on_one_machine_train_like_two_local_ranks(launcher, stages, tmp_path):
    root, outputs = stages
    tree = json.loads(json.dumps(outputs["a"][0]))
    tree["train"]["run"] = str(tmp_path / "run")
    tree["tracking"] = {"enabled": False}
    nodes = [
        launcher.start(tree | {"launch": section}, tmp_path / f"node{rank}.toml")
        for rank, section in enumerate(launcher.two_nodes(tmp_path, 1))
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert losses(tmp_path / "run") == losses(root / "a")
    two_nodes = read_adapter(tmp_path / "run" / "adapter.safetensors")[1]
    two_ranks = read_adapter(root / "a" / "adapter.safetensors")[1]
    assert all(torch.equal(two_nodes[name], two_ranks[name]) for name in two_ranks)


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGUSR1, 0)]
)
def test_a_signal_saves_within_a_step_and_exits_cleanly(launcher, config, tmp_path, number, workers):
    config["train"]["steps"] = 100_000
    config["data"]["workers"] = workers
    process = launcher.start(config, tmp_path / "config.toml", through_wanmoe=True)
    for line in process.stdout:
        if line.startswith("step 0: held-out loss"):
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 0, rest[-3000:]
    assert "stopped by signal at step" in rest
    (state,) = (tmp_path / "run" / "resume").iterdir()
    trainer = json.loads((state / "trainer.json").read_text())
    assert 0 < trainer["step"] < 100_000
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_sample(ranks, config, tmp_path):
    """One clip so large that its loss overflows: skipped on both ranks, then the run gives up."""
    with ShardWriter(tmp_path / "huge", STAND_IN, STAND_IN, null_context=torch.ones(1, 16)) as writer:
        for index, split in enumerate(("train", "train", "val")):
            meta = {
                "caption": "a clip",
                "instruments": [{"name": "Suction", "weight": 1.0}],
                "source": str(index),
            }
            scale = 1e30 if index == 0 else 1.0
            latent = (torch.randn(16, 2, 4, 4) * scale).bfloat16()
            writer.add(f"clip_{index:03d}_abcdef01", split, latent, torch.randn(2, 16), meta)
    config["data"]["shards"] = str(tmp_path / "huge")
    config["objective"]["roi"] = 0
    config["train"] |= {"max_bad_steps": 2, "accumulation": 2}
    output = ranks.fail(config)
    assert "step 1: the loss is not finite; skipped on all ranks; samples:" in output
    assert "2 steps in a row were skipped" in output and "clip_000_abcdef01" in output
    assert "Traceback" not in output
    saved = load_file(tmp_path / "run" / "adapter.safetensors")
    ups = [value for name, value in saved.items() if "_up" in name]
    assert ups and not any(up.any() for up in ups)


def test_bf16_training_keeps_fp32_masters(ranks, config, tmp_path):
    """Updates far below the step of a bf16 number (1/256 of the value) still add up (trap A15)."""
    config["train"] |= {"precision": "bf16", "steps": 4}
    config["optimizer"] = {"lr": 1e-5, "warmup_steps": 0, "weight_decay": 0.0}
    ranks.run(config)
    state = load_file(tmp_path / "run" / "resume" / "step_00000004" / "state.safetensors")
    masters = {name: value for name, value in state.items() if name.startswith("param/")}
    assert {value.dtype for value in masters.values()} == {torch.float32}
    down = masters["param/blocks.2.self_attn.q.base_down"]
    assert not torch.equal(down, down.bfloat16().float())


def test_shards_of_another_text_encoder_are_refused_in_one_line(ranks, config, tmp_path):
    config["model"] = {"preset": "tiny"}  # reads text 64 wide, the shards hold 16
    config["train"] |= {"stage": "pretrain", "steps": 3}
    del config["adapter"]
    output = ranks.fail(config)
    assert "Traceback" not in output
    assert "text embeddings are 16 wide, the model reads 64" in output
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_experts_and_router_train_together_with_recomputation_and_readers(ranks, stages, tmp_path):
    root, outputs = stages
    tree = json.loads(json.dumps(outputs["b"][0]))
    tree["train"] |= {"run": str(tmp_path / "run"), "train_router": True, "checkpointing": True}
    tree["router"] = {"mode": "learned"}
    tree["data"]["workers"] = 1
    ranks.run(tree)
    info, tensors = read_adapter(tmp_path / "run" / "adapter.safetensors")
    start = read_adapter(root / "a" / "adapter.safetensors")[1]
    assert info.stage == "b+base+router" and info.router.mode == "learned"
    assert all(tensors[name].any() for name in tensors)
    assert not any(torch.equal(tensors[n], start[n]) for n in start)
    assert {"train/teacher_kl", "train/diffusion"} < set(read_metrics(tmp_path / "run")[-2])


def test_experts_train_on_an_imported_lora_that_stays_as_it_is(ranks, config, base, tmp_path):
    """A full-coverage LoRA in every block, the prefix too; without its part there the losses are others."""
    generator = torch.Generator().manual_seed(0)
    dit = load_dit(base)
    factors = {}
    for name in (
        f"blocks.{i}.{linear}" for i in range(3) for linear in ("self_attn.q", "cross_attn.v", "ffn.2")
    ):
        d_out, d_in = dit.get_parameter(f"{name}.weight").shape
        factors[name] = (
            torch.randn(3, d_in, generator=generator),
            torch.randn(d_out, 3, generator=generator) * 0.1,
        )
    write_lora(tmp_path / "style.safetensors", factors)
    small = AdapterConfig(blocks=1, ffn_blocks=1)
    adapter = import_adapter(tmp_path / "style.safetensors", dit, config=small)
    del config["adapter"]
    for run in ("whole", "bare"):
        if run == "bare":
            for name, parameter in adapter.parameters(("base",)).items():
                parameter.data *= not name.startswith(("blocks.0.", "blocks.1."))
        start = save_adapter(adapter, tmp_path / f"{run}.safetensors", stage="a", step=0)
        config["model"]["adapter"] = str(start)
        config["train"] |= {"stage": "b", "freeze_base": True, "run": str(tmp_path / run), "steps": 3}
        assert "prefix 2 of 3 blocks without a graph" in ranks.run(config)
        before, after = (read_adapter(path)[1] for path in (start, tmp_path / run / "adapter.safetensors"))
        assert all(torch.equal(after[name], value) == (".base_" in name) for name, value in before.items())
    assert losses(tmp_path / "bare") != pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_a_finished_run_whose_file_is_gone_writes_it_again(ranks, stages, tmp_path):
    root, outputs = stages
    shutil.copytree(root / "b", tmp_path / "b")
    (tmp_path / "b" / "adapter.safetensors").unlink()
    tree = json.loads(json.dumps(outputs["b"][0]))
    tree["train"]["run"] = str(tmp_path / "b")
    ranks.run(tree)
    again = read_adapter(tmp_path / "b" / "adapter.safetensors")[1]
    before = read_adapter(root / "b" / "adapter.safetensors")[1]
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_resume_on_another_start_file_or_with_another_rate_is_refused(ranks, stages, tmp_path):
    root, outputs = stages
    shutil.copytree(root / "b", tmp_path / "b")
    tree = json.loads(json.dumps(outputs["b"][0]))
    tree["train"]["run"] = str(tmp_path / "b")
    tree["model"]["adapter"] = str(root / "c" / "adapter.safetensors")
    output = ranks.fail(tree)
    assert "belongs to another run (adapter_sha256" in output
    tree["model"]["adapter"] = str(root / "a" / "adapter.safetensors")
    tree["optimizer"]["lr"] = 0.5
    output = ranks.fail(tree)
    assert "(optimizer.lr was 0.01, is 0.5)" in output


def test_nodes_that_do_not_share_the_run_folder_are_told_so(launcher, stages, tmp_path):
    """Node 0 would resume at step 3 and node 1 start at 0: their collectives would mix."""
    root, outputs = stages
    shutil.copytree(root / "a", tmp_path / "shared0")
    shutil.rmtree(tmp_path / "shared0" / "resume" / "step_00000006")
    nodes = []
    for rank, section in enumerate(launcher.two_nodes(tmp_path, 1)):
        folder = tmp_path / f"disk{rank}"
        folder.mkdir()
        tree = json.loads(json.dumps(outputs["a"][0])) | {"launch": section}
        # The same path on both, seen through each node's own working folder.
        tree["train"]["run"] = "run"
        if rank == 0:
            (tmp_path / "shared0").rename(folder / "run")
        nodes.append(launcher.start(tree, folder / "config.toml"))
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert all(node.returncode != 0 for node in nodes)
    assert any("the ranks disagree on the resume state" in text for text in texts), texts[0][-3000:]


def test_saving_gathers_only_what_trains_and_clipping_reaches_the_router(ranks, stages, tmp_path):
    """Collectives of a save are counted; a tiny clipping norm stops the router's weights (traps B6, A7)."""
    _, outputs = stages
    tree = json.loads(json.dumps(outputs["c"][0]))
    tree["train"] |= {"run": str(tmp_path / "run"), "steps": 2}
    tree["optimizer"] |= {"max_grad_norm": 1e-12, "eps": 1e-6, "weight_decay": 0.0}
    found = alone(
        ranks,
        tree,
        tmp_path,
        """
import deepspeed.comm
from wanmoe.train.optimizer_state import gather_parameters
side = trainer.sides[0]
before = gather_parameters(side.engine, side.trainable)
trainer.fit()
after = gather_parameters(side.engine, side.trainable)
moved = max(float((after[name] - before[name]).abs().max()) for name in before)
gathered = 0
for name in ("all_gather_into_tensor", "all_gather", "broadcast", "allgather_fn", "all_gather_coalesced"):
    plain = getattr(deepspeed.comm, name)
    def counted(*args, plain=plain, **more):
        global gathered
        gathered += sum(t.numel() for t in args if isinstance(t, torch.Tensor))
        return plain(*args, **more)
    setattr(deepspeed.comm, name, counted)
trainer._save()
trainer.saver.wait()
result = {"moved": moved, "gathered": gathered, "trainable": side.count}
""",
    )
    # Masters and two moments of what trains, each once as input and once as output.
    assert found["gathered"] == 2 * 3 * found["trainable"]
    assert found["moved"] < 1e-6


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(ranks, stages, tmp_path):
    """DeepSpeed drops such a step without a word; two in a row end the run here."""
    _, outputs = stages
    tree = json.loads(json.dumps(outputs["a"][0]))
    tree["train"] |= {"run": str(tmp_path / "run"), "max_bad_steps": 2}
    tree["tracking"] = {"enabled": False}
    found = alone(
        ranks,
        tree,
        tmp_path,
        """
from wanmoe.moe_lora import WanmoeError
from wanmoe.train.optimizer_state import gather_parameters
side = trainer.sides[0]
before = gather_parameters(side.engine, side.trainable)
next(iter(side.trainable.values())).register_hook(lambda gradient: gradient * float("nan"))
message = ""
try:
    trainer.fit()
except WanmoeError as error:
    message = str(error)
after = gather_parameters(side.engine, side.trainable)
same = all(torch.equal(before[name], after[name]) for name in before)
trainer._save()
trainer.saver.wait()
result = {"message": message, "same": same, "step": trainer.step}
""",
    )
    assert "2 steps in a row were skipped, at last because the gradient is not finite" in found["message"]
    assert "train_0" in found["message"]
    assert found["same"] and found["step"] == 1  # the second is the one that ended it


def alone(ranks, tree, folder, code):
    """Runs code on the `trainer` of one rank; returns the `result` that it leaves."""
    path = folder / "result.json"
    ranks.run(tree, 1, code=code, result=str(path))
    return json.loads(path.read_text())


def test_metrics_are_finite_and_complete(stages):
    root, _ = stages
    lines = [line for line in read_metrics(root / "a") if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {"train/lr", "train/grad_norm", "train/steps_per_s", "train/diffusion"} < set(lines[-1])


def test_what_a_run_wrote_down_asks_for_the_same_run(ranks, stages, tmp_path):
    """Stage b decides by itself how loud its experts are, stage c takes it from the file."""
    root, _ = stages
    for stage in ("b", "c"):
        run = tmp_path / stage
        shutil.copytree(root / stage, run)
        written = tomllib.loads((run / "config.toml").read_text())
        assert (written["router"]["bands"], written["router"]["floor"]) == ([[0.0, 1.0]], 0.5)
        router = read_adapter(run / "adapter.safetensors")[0].router
        assert router.loudness == "bands [[0.0, 1.0]], floor 0.5"
        written["train"]["run"] = str(run)
        assert "is complete: 6 steps are done" in ranks.run(written)
