"""What else goes into a generation: merged weights, LoRAs, text encoder, first and last frame, CLIP."""

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from wanmoe.infer import LoRAMoEInference, pipeline
from wanmoe.infer.memory import Needs
from wanmoe.infer.request import Job, make_job
from wanmoe.infer.route import Wish
from wanmoe.moe_lora import AdapterConfig, RouterConfig, attach, save_adapter
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.lora_file import write_lora
from wanmoe.moe_lora.lora_merge import LoRASpec
from wanmoe.moe_lora.video import read_image, read_metadata, to_model
from wanmoe.moe_lora.wan import text
from wanmoe.moe_lora.wan.codec import load_vae
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.text import HashTextEncoder
from wanmoe.moe_lora.wan.weights import load_dit

HOOK, SUCTION = "Hook/Electrocautery", "Suction"
I2V = WanConfig(**{**WanConfig.preset("tiny").__dict__, "task": "i2v", "in_dim": 36})
FAST = {"num_frames": 5, "video_size": (32, 48), "num_steps": 3, "guidance_scale": 1.0, "seed": 3}
MODEL = {"vae_path": "haar", "t5_path": "hash", "alpha_base": 1.0, "device": "cpu"}


# ---------------------------------------------------------------------------------- merged, other LoRAs


def test_merged_weights_make_the_same_video_and_say_their_error(
    inference: LoRAMoEInference, files: Path, tmp_path: Path
) -> None:
    paths = {"dit_path": files / "low.safetensors", "lora_moe_weights": files / "adapter.safetensors"}
    merged = LoRAMoEInference("t2v", **paths, **MODEL, merged=True)
    path = tmp_path / "m.mp4"
    settings = {**FAST, "num_steps": 8, "flow_shift": 1.0}
    video = merged.generate("tissue", HOOK, **settings, output_path=path)
    assert (video.float() - inference.generate("tissue", HOOK, **settings).float()).abs().max() <= 1
    errors = json.loads(read_metadata(path)["settings"])["merged_error"]
    assert len(errors) == 3 and max(errors.values()) < 1e-4  # one for each band of t that the steps meet
    with pytest.raises(WanmoeError, match="merged weights hold one mix"):
        merged.generate("tissue", schedule="0:Hook", **FAST)


def test_a_lora_is_merged_into_its_own_side(files: Path, tmp_path: Path) -> None:
    low, high = files / "low.safetensors", files / "high.safetensors"
    generator = torch.Generator().manual_seed(0)
    name, width = "blocks.0.self_attn.q", WanConfig.preset("tiny").dim
    factors = {name: tuple(torch.randn(s, generator=generator) for s in ((3, width), (width, 3)))}
    write_lora(tmp_path / "x.safetensors", factors)
    pair = {"dit_path": low, "dit_high_noise_path": high, **MODEL}
    spec = LoRASpec.parse(f"{tmp_path / 'x.safetensors'}:0.5:high")
    model = LoRAMoEInference("t2v", **pair, loras=[spec])
    found = {side: model.sides[side].dit.get_parameter(f"{name}.weight") for side in ("low", "high")}
    plain = {
        side: load_dit(path).get_parameter(f"{name}.weight") for side, path in (("low", low), ("high", high))
    }
    down, up = factors[name]
    assert torch.equal(found["low"], plain["low"])
    torch.testing.assert_close(found["high"], plain["high"] + 0.5 * up @ down, rtol=1e-5, atol=1e-5)
    with pytest.raises(WanmoeError, match="there is only one model"):
        LoRAMoEInference("t2v", low, **MODEL, loras=[spec])


def test_a_plain_lora_runs_as_the_base_adapter(files: Path, tmp_path: Path) -> None:
    """Kept whole at alpha_base 1 it does what merging does."""
    name, width = "blocks.1.ffn.2", WanConfig.preset("tiny").dim
    generator = torch.Generator().manual_seed(0)
    factors = (torch.randn(3, 384, generator=generator), torch.randn(width, 3, generator=generator) * 0.1)
    write_lora(tmp_path / "x.safetensors", {name: factors}, format="diffusers")
    kept = LoRAMoEInference(
        "t2v", files / "low.safetensors", lora_moe_weights=tmp_path / "x.safetensors", **MODEL
    )
    merged = LoRAMoEInference(
        "t2v", files / "low.safetensors", loras=[LoRASpec(tmp_path / "x.safetensors")], **MODEL
    )
    plain = LoRAMoEInference("t2v", files / "low.safetensors", **MODEL)
    video = kept.generate("liver", **FAST).float()
    assert (video - merged.generate("liver", **FAST).float()).abs().max() <= 1
    assert (video - plain.generate("liver", **FAST).float()).abs().max() > 1


# ---------------------------------------------------------------------------------------- text encoder


def test_the_text_encoder_is_read_once_and_released(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Encoder(HashTextEncoder):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            loaded.append(weakref.ref(self))

    monkeypatch.setattr(text, "HashTextEncoder", Encoder)
    model = LoRAMoEInference("t2v", files / "low.safetensors", prompts=["hook", "scissors"], **MODEL)
    assert len(loaded) == 1 and loaded[0]() is None
    model.generate("hook", **FAST)
    model.generate("scissors", **FAST)
    assert len(loaded) == 1
    model.generate("a prompt that is new", **FAST)
    assert len(loaded) == 2 and loaded[1]() is None


# ------------------------------------------------------------------------------------ first, last, CLIP


def test_the_last_frame_of_an_i2v_clip_acts(files: Path, tmp_path: Path) -> None:
    model = LoRAMoEInference("i2v", files / "i2v.safetensors", **MODEL)
    assert cv2.imwrite(str(tmp_path / "end.png"), np.full((40, 60, 3), 200, np.uint8))
    first = model.generate("hook", image_path=files / "image.png", **FAST)
    both = model.generate(
        "hook", image_path=files / "image.png", last_image_path=tmp_path / "end.png", **FAST
    )
    assert not torch.equal(first, both)


def test_a_wan21_image_model_takes_clip_tokens(
    write_dit: Callable[..., Path], files: Path, tmp_path: Path
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=160, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    dit = write_dit(tmp_path / "i2v.safetensors", dataclasses.replace(I2V, image_dim=160), 3)
    with pytest.raises(WanmoeError, match="needs clip_path"):
        LoRAMoEInference("i2v", dit, **MODEL)
    model = LoRAMoEInference("i2v", dit, clip_path=tmp_path / "clip", **MODEL)
    video = model.generate("hook", image_path=files / "image.png", **FAST)
    assert video.shape == (5, 32, 48, 3)


# ------------------------------------------------------------------------------------------ the card


def job(model: LoRAMoEInference, frames: int, size: tuple[int, int], guidance: object = None) -> Job:
    given = dict.fromkeys(("num_steps", "flow_shift", "image_path", "last_image_path", "output_path"))
    given |= {"num_frames": frames, "video_size": size, "guidance_scale": guidance, "solver": "unipc"}
    return make_job(model.config, False, prompt="hook", wish=Wish(), seed=1, negative_prompt="", **given)


@pytest.fixture
def card(inference: LoRAMoEInference, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """card(free GB): the pipeline is told of a card of 80 GB, and that a clip takes 10 GB and 0.8 beside."""
    monkeypatch.setattr(inference, "device", torch.device("cuda"))
    monkeypatch.setattr(
        pipeline, "needs", lambda *given, clips, **more: Needs(0, 0, int(clips * 10e9), 10**9)
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)

    def free(gigabytes: float) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(gigabytes * 1e9), 80 * 10**9))

    return free


@pytest.mark.parametrize(
    ("free", "guidance", "batched"),
    [(21, (3.0, 4.0), True), (21, (1.0, 1.0), False), (20, (3.0, 4.0), False)],
)
def test_both_passes_share_a_forward_where_the_card_has_room(
    inference: LoRAMoEInference, card: Callable[[float], None], free: float, guidance: object, batched: bool
) -> None:
    card(free)
    assert inference._fits_batched(job(inference, 41, (256, 256), guidance)) == batched


def test_a_card_that_is_too_small_is_said_before_the_first_step(
    inference: LoRAMoEInference, card: Callable[[float], None]
) -> None:
    card(10.7)
    with pytest.raises(
        WanmoeError, match=r"needed on the card 10.8 GB.* 10.7 of 80 GB are free; let .*--stream"
    ):
        inference._fits_batched(job(inference, 81, (720, 1280)))


def test_the_router_of_an_i2v_adapter_reads_the_first_frame(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A classifier is given the first latent frame, whatever follows, and its logits decide."""
    dit = load_dit(files / "i2v.safetensors")
    router = RouterConfig(mode="learned", first_frame_classes=2, time_gate="learned")
    adapter = attach(dit, AdapterConfig(blocks=2), router)
    assert adapter.router is not None
    adapter.router.hidden.weight.data[:, -2:] *= 100
    weights = save_adapter(adapter, tmp_path / "a.safetensors", stage="c", step=1)
    frames: list[torch.Tensor] = []

    def classifier(latent: torch.Tensor) -> torch.Tensor:
        frames.append(latent)
        return torch.tensor([[9.0, -9.0]])

    gates = []
    for judge in (classifier, None):
        model = LoRAMoEInference(
            "i2v", files / "i2v.safetensors", lora_moe_weights=weights, **MODEL, first_frame=judge
        )
        caplog.clear()
        with caplog.at_level("INFO", logger="wanmoe.infer"):
            path = tmp_path / "v.mp4"
            model.generate("tissue", image_path=files / "image.png", **FAST, output_path=path)
        written = read_metadata(path)
        gates.append(json.loads(written["gates"])["low"]["gates"])
        assert json.loads(written["settings"])["ema"] == {"low": 0.5}
        assert ("which it was not given" in caplog.text) == (judge is None)
    assert [tuple(latent.shape) for latent in frames] == [(1, 16, 1, 4, 6)]
    picture = to_model(read_image(files / "image.png", (32, 48))[None])
    torch.testing.assert_close(frames[0], load_vae("haar").encode(picture[None]))
    assert gates[0] != gates[1]


# ------------------------------------------------------------------------------------- blocks that stream


def both_sides(files: Path, **more: object) -> LoRAMoEInference:
    given = {"dit_high_noise_path": files / "high.safetensors", "any_base": True} | MODEL | more
    return LoRAMoEInference(
        "t2v", files / "low.safetensors", lora_moe_weights=files / "adapter.safetensors", **given
    )


@pytest.fixture(scope="module")
def truth(files: Path) -> torch.Tensor:
    return both_sides(files).generate("hook", **FAST | {"guidance_scale": 3.0})


@pytest.mark.parametrize("stream", [0, 1, 3, 8])
def test_streamed_blocks_make_the_same_video_with_both_noise_experts(
    files: Path, truth: torch.Tensor, stream: int
) -> None:
    model = both_sides(files, stream=stream)
    for _ in range(2):  # the second begins where the first ended
        assert torch.equal(model.generate("hook", **FAST | {"guidance_scale": 3.0}), truth)
    held = [side.dit.streamed for side in model.sides.values()]
    assert all((one is not None) == bool(stream) for one in held)
    assert len({id(one.ring) for one in held if one is not None}) == bool(stream)


def test_a_quantised_model_says_its_error_and_makes_nearly_the_same(
    files: Path, truth: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wanmoe")
    video = both_sides(files, quantised="fp8", stream=2).generate("hook", **FAST | {"guidance_scale": 3.0})
    assert 0 < (video.float() - truth.float()).abs().mean() < 0.05 * truth.float().std()
    said = [
        record.message for record in caplog.records if "relative error of its weights 2." in record.message
    ]
    assert [line.split()[0] for line in said] == ["low-noise", "high-noise"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stream": 9}, "--stream 9: the model has 8 blocks; give 0 to as many"),
        ({"stream": -1}, "stream -1: the model has 8 blocks"),
        ({"stream": 2, "merged": True}, "leave --merged out, or --stream and --quantised"),
        ({"quantised": "int8", "compiled": True}, "leave --compile out, or --stream and --quantised"),
        ({"quantised": "int3"}, "unknown format 'int3'"),
    ],
)
def test_what_does_not_go_with_streamed_blocks_is_one_line(
    files: Path, given: dict[str, object], said: str
) -> None:
    with pytest.raises(WanmoeError, match=said):
        both_sides(files, **given)
