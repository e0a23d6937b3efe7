"""Generation on the `tiny` preset with random weights: seeds, hints, files, and what is refused."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import torch

from wanmoe.infer import LoRAMoEInference
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import SURGICAL
from wanmoe.moe_lora.routing import pool_text
from wanmoe.moe_lora.video import read_metadata, read_video
from wanmoe.moe_lora.wan.codec import HaarCodec, image_condition
from wanmoe.moe_lora.wan.text import HashTextEncoder, encode_prompts
from wanmoe.moe_lora.wan.weights import dit_hash

HOOK, SUCTION = "Hook/Electrocautery", "Suction"
FAST = {"num_frames": 5, "video_size": (32, 48), "num_steps": 3, "guidance_scale": 1.0, "seed": 3}
MODEL = {"vae_path": "haar", "t5_path": "hash", "alpha_base": 1.0, "device": "cpu"}


# ------------------------------------------------------------------------------------------ what is made


def test_the_same_seed_makes_the_same_video(inference: LoRAMoEInference) -> None:
    video = inference.generate("剪刀剪切", **FAST)
    assert (video.dtype, tuple(video.shape)) == (torch.uint8, (5, 32, 48, 3))
    assert video.float().std() > 1
    assert torch.equal(inference.generate("剪刀剪切", **FAST), video)
    assert not torch.equal(inference.generate("剪刀剪切", **{**FAST, "seed": 4}), video)


def test_hints_choose_experts_that_differ(inference: LoRAMoEInference) -> None:
    videos = [inference.generate("tissue", expert.name, **FAST) for expert in SURGICAL]
    videos.append(inference.generate("tissue", **FAST))
    for i, first in enumerate(videos):
        for second in videos[:i]:
            assert not torch.equal(first, second)


def test_without_experts_hints_say_nothing(files: Path) -> None:
    paths = {"dit_path": files / "low.safetensors", "lora_moe_weights": files / "adapter.safetensors"}
    mute = LoRAMoEInference("t2v", **paths, **{**MODEL, "alpha_expert": 0.0})
    base = mute.generate("tissue", **FAST)
    for hint in (HOOK, SUCTION):
        assert torch.equal(mute.generate("tissue", hint, **FAST), base)
    silent = LoRAMoEInference("t2v", **paths, **{**MODEL, "alpha_base": 0.0, "alpha_expert": 0.0})
    frozen = LoRAMoEInference("t2v", files / "low.safetensors", **MODEL)
    assert torch.equal(silent.generate("tissue", HOOK, **FAST), frozen.generate("tissue", **FAST))
    assert not torch.equal(base, frozen.generate("tissue", **FAST))


def test_a_mix_of_one_is_a_hint_and_a_mix_of_two_is_neither(inference: LoRAMoEInference) -> None:
    hook = inference.generate("tissue", HOOK, **FAST)
    assert torch.equal(inference.generate("tissue", mix={HOOK: 2.0}, **FAST), hook)
    both = inference.generate("tissue", mix={HOOK: 0.6, SUCTION: 0.4}, **FAST)
    assert not torch.equal(both, hook)


def test_guidance_and_the_negative_prompt_act(inference: LoRAMoEInference) -> None:
    plain = inference.generate("hook", **FAST)
    strong = {**FAST, "guidance_scale": (3.0, 4.0)}
    guided = inference.generate("hook", **strong)
    assert not torch.equal(guided, plain)
    assert not torch.equal(inference.generate("hook", **strong, negative_prompt="grey"), guided)
    assert torch.equal(inference.generate("hook", **strong, negative_prompt=""), guided)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_every_solver_runs(inference: LoRAMoEInference, solver: str) -> None:
    steps: list[tuple[int, int, str]] = []
    video = inference.generate("hook", **FAST, solver=solver, progress=lambda *step: steps.append(step))
    assert video.float().std() > 1
    assert [step[:2] for step in steps] == [(1, 3), (2, 3), (3, 3)]


def test_vanilla_is_euler(inference: LoRAMoEInference) -> None:
    euler = inference.generate("hook", **FAST, solver="euler")
    assert torch.equal(inference.generate("hook", **FAST, solver="vanilla"), euler)


# --------------------------------------------------------------------------------------------- the file


def test_the_written_file_is_the_returned_video(inference: LoRAMoEInference, tmp_path: Path) -> None:
    path = tmp_path / "hook.mp4"
    video = inference.generate("电凝钩切割", **{**FAST, "num_frames": 9}, output_path=path)
    assert {p.name for p in tmp_path.iterdir()} == {"hook.mp4", "hook.gates.png"}
    read = read_video(path)
    assert read.shape == video.shape
    # Dark and bright ends survive: a video in [-1, 1] taken for [0, 1] would lose its lower half.
    assert (read.float().mean() - video.float().mean()).abs() < 3
    luma = torch.tensor([0.2126, 0.7152, 0.0722])
    error = ((read.float() - video.float()) @ luma).abs().mean()
    assert error < 6 < (video.float() @ luma).std()
    about = read_metadata(path)
    assert (about["prompt"], about["seed"]) == ("电凝钩切割", "3")
    assert json.loads(about["gates"])["low"]["source"] == "prompt"
    assert json.loads(about["gates"])["low"]["gates"][HOOK] == 1.0
    assert json.loads(about["settings"])["num_steps"] == 3
    assert about["codec"] == "haar (stand-in)"
    assert "adapter.safetensors" in about["adapter"]


def test_a_seed_is_drawn_and_said(inference: LoRAMoEInference, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    video = inference.generate("hook", **{**FAST, "seed": None}, output_path=path)
    again = inference.generate("hook", **{**FAST, "seed": int(read_metadata(path)["seed"])})
    assert torch.equal(again, video)


# ---------------------------------------------------------------------------------------------- routing


def test_a_mix_goes_before_a_hint_and_a_hint_before_the_prompt(inference: LoRAMoEInference) -> None:
    assert inference.route("剪刀", HOOK, {SUCTION: 1.0})["low"].source == "mix"
    assert inference.route("剪刀", HOOK, {SUCTION: 1.0})["low"].gates[SUCTION] == 1.0
    assert inference.route("剪刀", HOOK)["low"] == (
        {"Scissors": 0.0, HOOK: 1.0, SUCTION: 0.0, "Other": 0.0},
        "hint",
        None,
        HOOK,
        False,
        "the base adapter alone",
    )
    assert inference.route("剪刀")["low"].source == "prompt"
    assert inference.route("剪刀")["low"].gates["Scissors"] == 1.0
    several = inference.route("剪刀剪切,吸引器")["low"].gates
    assert several["Scissors"] > several[SUCTION] > 0 == several["Other"]


def test_no_evidence_is_the_base_alone_and_is_said(
    write_adapter: Callable[..., Path],
    inference: LoRAMoEInference,
    files: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert inference.route("liver")["low"].source == "none"
    assert not any(inference.route("liver")["low"].gates.values())
    with caplog.at_level(logging.INFO, logger="wanmoe.infer"):
        inference.generate("liver", **FAST)
    assert "the base adapter alone" in caplog.text
    path = write_adapter(tmp_path / "f.safetensors", files / "low.safetensors", fallback="Other")
    other = LoRAMoEInference("t2v", files / "low.safetensors", lora_moe_weights=path, **MODEL)
    assert other.route("liver")["low"].source == "fallback"
    assert other.route("liver")["low"].gates["Other"] == 1.0


def test_the_learned_router_of_the_file_decides(files: Path) -> None:
    learned = LoRAMoEInference(
        "t2v", files / "low.safetensors", lora_moe_weights=files / "learned.safetensors", **MODEL
    )
    adapter = learned.sides["low"].adapter
    assert adapter is not None and adapter.router is not None
    with torch.no_grad():
        full = adapter.router(pool_text(encode_prompts(HashTextEncoder(), ["剪刀"])))[0]
    route = learned.route("剪刀")["low"]
    assert route.source == "router"
    kept = full.topk(2)
    assert sorted(route.gates.values())[-2:] == pytest.approx(
        sorted((kept.values / kept.values.sum()).tolist()), abs=1e-6
    )
    assert sum(weight > 0 for weight in route.gates.values()) == 2
    assert learned.route("剪刀", HOOK)["low"].source == "hint"


def test_a_learned_router_that_is_not_in_the_file_is_an_error(
    write_adapter: Callable[..., Path], files: Path, tmp_path: Path
) -> None:
    path = write_adapter(
        tmp_path / "bare.safetensors", files / "low.safetensors", router="learned", with_router=False
    )
    with pytest.raises(WanmoeError, match="holds no router"):
        LoRAMoEInference("t2v", files / "low.safetensors", lora_moe_weights=path, **MODEL)


# ------------------------------------------------------------------------------------ two noise experts


def test_both_noise_experts_run_with_their_own_adapters(
    write_adapter: Callable[..., Path], files: Path, tmp_path: Path
) -> None:
    low, high = files / "low.safetensors", files / "high.safetensors"
    pair = (
        write_adapter(tmp_path / "l.safetensors", low, noise_expert="low"),
        write_adapter(tmp_path / "h.safetensors", high, seed=1, noise_expert="high"),
    )
    steps: list[str] = []
    settings = {**FAST, "num_steps": 6}

    def video(weights: object, **more: object) -> torch.Tensor:
        model = LoRAMoEInference(
            "t2v", low, dit_high_noise_path=high, lora_moe_weights=weights, **{**MODEL, **more}
        )
        return model.generate("hook", HOOK, **settings, progress=lambda _i, _n, side: steps.append(side))

    both = video(pair)
    assert set(steps) == {f"high noise, {HOOK}", f"low noise, {HOOK}"}
    assert steps == sorted(steps)
    for one in (pair[0], pair[1], (pair[0], None)):
        assert not torch.equal(video(one), both)
    assert torch.equal(video(pair[0]), video((pair[0], None)))
    with pytest.raises(WanmoeError, match="noise expert"):
        video((pair[1], pair[0]))
    assert video((pair[1], pair[0]), any_base=True).float().std() > 1
    with pytest.raises(WanmoeError, match="high noise expert"):
        LoRAMoEInference("t2v", low, lora_moe_weights=pair[1], **MODEL)
    with pytest.raises(WanmoeError, match="dit_high_noise_path"):
        LoRAMoEInference("t2v", low, lora_moe_weights=pair, **MODEL)


# -------------------------------------------------------------------------------------------------- i2v


def test_the_image_condition_is_a_mask_and_the_latent_of_the_image() -> None:
    codec = HaarCodec()
    image = torch.rand(3, 16, 32) * 2 - 1
    condition = image_condition(codec, image, 9)
    assert condition.shape == (1, 20, 3, 2, 4)
    assert (condition[:, :4, 0] == 1).all() and not condition[:, :4, 1:].any()
    video = torch.cat([image[:, None], torch.zeros(3, 8, 16, 32)], dim=1)[None]
    torch.testing.assert_close(condition[:, 4:], codec.encode(video), atol=0, rtol=0)


def test_i2v_needs_its_image_and_t2v_refuses_one(files: Path, inference: LoRAMoEInference) -> None:
    model = LoRAMoEInference("i2v", files / "i2v.safetensors", **MODEL)
    video = model.generate("hook", image_path=files / "image.png", **FAST)
    assert video.shape == (5, 32, 48, 3)
    with pytest.raises(WanmoeError, match="needs image_path"):
        model.generate("hook", **FAST)
    with pytest.raises(WanmoeError, match="takes no image"):
        inference.generate("hook", image_path=files / "image.png", **FAST)
    with pytest.raises(WanmoeError, match=r"absent\.png"):
        model.generate("hook", image_path=files / "absent.png", **FAST)


# ------------------------------------------------------------------------------------------ bad requests


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"instrument_hint": "Scisors"}, "nearest is 'Scissors'"),
        ({"mix": {"Suktion": 1.0}}, "nearest is 'Suction'"),
        ({"mix": {SUCTION: -1.0}}, "not negative"),
        ({"num_frames": 80}, "nearest is 81"),
        ({"num_frames": 0}, "nearest is 1"),
        ({"video_size": (30, 48)}, "nearest is 32x48"),
        ({"video_size": (32, 41)}, "nearest is 32x48"),
        ({"solver": "unipcc"}, "'unipc'"),
        ({"num_steps": 0}, "steps"),
        ({"output_path": "/nowhere/a.mp4"}, "/nowhere"),
        ({"output_path": "a.avi"}, "mp4"),
    ],
)
def test_bad_requests_are_one_clear_line(
    inference: LoRAMoEInference, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(WanmoeError) as caught:
        inference.generate("hook", **{**FAST, **wrong})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_models_are_one_clear_line(
    write_adapter: Callable[..., Path], files: Path, tmp_path: Path
) -> None:
    low = files / "low.safetensors"
    foreign = write_adapter(tmp_path / "a.safetensors", low, base_sha256=dit_hash(files / "high.safetensors"))
    for message, task, dit, more in [
        ("nearest is 't2v-A14B'", "t2v-A14", low, {}),
        ("t2v model, but the task is i2v", "i2v", low, {}),
        ("absent", "t2v", tmp_path / "absent.safetensors", {}),
        ("absent", "t2v", low, {"vae_path": tmp_path / "absent"}),
        ("absent", "t2v", low, {"t5_path": tmp_path / "absent"}),
        ("absent", "t2v", low, {"lora_moe_weights": tmp_path / "absent"}),
        ("none of a LoRA on Wan", "t2v", low, {"lora_moe_weights": low}),
        ("trained on base", "t2v", low, {"lora_moe_weights": foreign}),
    ]:
        with pytest.raises(WanmoeError) as caught:
            LoRAMoEInference(task, dit, **{**MODEL, **more})
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    LoRAMoEInference("t2v", low, **MODEL, lora_moe_weights=foreign, any_base=True)


def test_a_high_noise_adapter_needs_its_own_model(
    write_adapter: Callable[..., Path], files: Path, tmp_path: Path
) -> None:
    low, high = files / "low.safetensors", files / "high.safetensors"
    adapter = write_adapter(tmp_path / "h.safetensors", high, noise_expert="high", base_sha256=dit_hash(high))
    for given in (adapter, (adapter, None)):
        with pytest.raises(
            WanmoeError, match=r"h.safetensors belongs to the high noise .*dit_high_noise_path"
        ):
            LoRAMoEInference("t2v", low, lora_moe_weights=given, **MODEL)
    with pytest.raises(WanmoeError, match=r"h.safetensors is for a high-noise model.*dit_high_noise_path"):
        LoRAMoEInference("t2v", low, lora_moe_weights=(None, adapter), any_base=True, **MODEL)
    alone = LoRAMoEInference("t2v", low, lora_moe_weights=adapter, any_base=True, **MODEL)
    assert alone.sides["low"].adapter is not None
    pair = {"dit_path": low, "dit_high_noise_path": high, **MODEL}
    both = LoRAMoEInference("t2v", lora_moe_weights=adapter, **pair)
    assert both.sides["low"].adapter is None and both.sides["high"].adapter is not None
    with pytest.raises(WanmoeError, match="it belongs to the high noise expert, this model is low"):
        LoRAMoEInference("t2v", lora_moe_weights=(adapter, None), **pair)


def test_a_hint_without_an_adapter_is_an_error(files: Path) -> None:
    frozen = LoRAMoEInference("t2v", files / "low.safetensors", **MODEL)
    assert frozen.route("hook") == {}
    with pytest.raises(WanmoeError, match="lora_moe_weights"):
        frozen.generate("hook", HOOK, **FAST)


# --------------------------------------------------------------------------------- gates over the clip


def test_a_schedule_moves_from_one_expert_to_another_inside_the_clip(
    inference: LoRAMoEInference, tmp_path: Path
) -> None:
    settings = {**FAST, "num_frames": 9}
    hook, suction = (inference.generate("tissue", name, **settings) for name in (HOOK, SUCTION))
    path = tmp_path / "move.mp4"
    moved = inference.generate(
        "tissue", schedule="0:hook, 5:irrigator", ema=0.0, **settings, output_path=path
    )
    assert not torch.equal(moved, hook) and not torch.equal(moved, suction)
    constant = inference.generate("tissue", schedule=f"0:{HOOK}", **settings)
    assert (constant.float() - hook.float()).abs().max() <= 1  # gates by frame, not by clip: other rounding
    route = inference.route("scissors", schedule="0:hook, 5:irrigator", num_frames=9)["low"]
    assert route.source == "schedule"
    gates = json.loads(read_metadata(path)["gates"])["low"]
    names = list(gates["gates"])
    assert [max(zip(row, names, strict=True))[1] for row in gates["frames"]] == [HOOK, HOOK, SUCTION]
    assert cv2.imread(str(tmp_path / "move.gates.png")).std() > 5


def test_a_hint_is_understood_in_either_taxonomy(inference: LoRAMoEInference) -> None:
    bipolar, hook = (inference.route("tissue", name)["low"] for name in ("bipolar", HOOK))
    assert bipolar.gates == hook.gates
    assert "from the hint (bipolar): Hook/Electrocautery 1.00" in bipolar.describe()
    assert inference.route("tissue", "clipper")["low"].gates["Other"] == 1.0
    assert inference.route("tissue", mix={"irrigator": 1, "Scissors": 1})["low"].gates[SUCTION] == 0.5


# ------------------------------------------------------------------------------- the model's own settings


def test_what_is_not_given_is_what_the_model_was_released_with(
    inference: LoRAMoEInference, tmp_path: Path
) -> None:
    path = tmp_path / "own.mp4"
    inference.generate("hook", num_frames=1, video_size=(16, 16), output_path=path)
    settings = json.loads(read_metadata(path)["settings"])
    own = [settings[key] for key in ("num_steps", "flow_shift", "guidance_scale")]
    assert own == [50, 5.0, [5.0, 5.0]]  # of Wan2.1, for there is one model


def test_the_adapter_of_a_file_is_named_by_its_hash(
    inference: LoRAMoEInference, files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    inference.generate("hook", **FAST, output_path=path)
    digest = hashlib.sha256((files / "adapter.safetensors").read_bytes()).hexdigest()
    assert read_metadata(path)["adapter_sha256"] == f"low {digest}"
