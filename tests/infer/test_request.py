"""Everything that can be wrong with a request is found from headers, in one line."""

import dataclasses

import cv2
import numpy as np
import pytest

from wanmoe.infer.request import check_job, check_model, make_job
from wanmoe.infer.route import Wish
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import CHOLEC, ExpertSet
from wanmoe.moe_lora.wan.config import WanConfig

T2V, I2V, CLIP = (WanConfig.preset(name) for name in ("t2v-A14B", "i2v-A14B", "i2v-14B"))
FLF = dataclasses.replace(CLIP, image_positions=514)
FAMILIES = {"low": ExpertSet()}


def job(config=T2V, two=True, **changes):
    given = dict.fromkeys(
        ("num_steps", "guidance_scale", "flow_shift", "image_path", "last_image_path", "output_path")
    )
    given |= {"prompt": "hook", "wish": Wish(), "num_frames": 17, "video_size": (64, 64), "solver": "unipc"}
    return make_job(config, two, **{**given, "seed": 1, "negative_prompt": "", **changes})


@pytest.fixture
def picture(tmp_path):
    assert cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    return tmp_path / "a.png"


def test_the_models_own_settings_stand_where_none_is_given():
    own = job()
    assert (own.steps, own.guidance, own.shift) == (40, (3.0, 4.0), 12.0)
    assert job(guidance_scale=2).guidance == job(guidance_scale=[2, 2]).guidance == (2.0, 2.0)
    assert job(solver="vanilla").solver == "euler"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 16}, "nearest is 17"),
        ({"video_size": (64, 65)}, "nearest is 64x64"),
        ({"num_steps": 0}, "steps is 0"),
        ({"flow_shift": -2}, "shift is -2"),
        ({"flow_shift": float("inf")}, "must be finite"),
        ({"guidance_scale": float("nan")}, "must be finite"),
        ({"guidance_scale": [1, 2, 3]}, "one number, or two"),
        ({"solver": "unipcc"}, "did you mean 'unipc'"),
        ({"seed": 2**70}, "seed"),
        ({"seed": -1}, "seed"),
        ({"image_path": "a.png"}, "takes no image"),
        ({"wish": Wish(hint="stapler")}, "unknown expert 'stapler'"),
        ({"wish": Wish(schedule="0:Hook, 17:Suction")}, "last frame is 16"),
        ({"wish": Wish(schedule="0:Hook", ema=1.0)}, "ema 1.0"),
        ({"output_path": "a.avi"}, "mp4"),
        ({"output_path": "/nowhere/a.mp4"}, "/nowhere"),
    ],
)
def test_a_video_that_cannot_be_made_is_one_line(changes, message):
    with pytest.raises(WanmoeError) as caught:
        check_job(job(**changes), T2V, FAMILIES, merged=False)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_go_together_is_refused():
    check_job(job(wish=Wish(hint="bipolar")), T2V, FAMILIES, merged=True)
    with pytest.raises(WanmoeError, match="merged weights hold one mix"):
        check_job(job(wish=Wish(schedule="0:Hook")), T2V, FAMILIES, merged=True)
    with pytest.raises(WanmoeError, match="but no adapter"):
        check_job(job(wish=Wish(hint="Hook")), T2V, {}, merged=False)
    with pytest.raises(WanmoeError, match="different experts"):
        check_job(job(), T2V, FAMILIES | {"high": ExpertSet(CHOLEC)}, merged=False)
    with pytest.raises(WanmoeError, match="48 latent channels"):
        check_model(WanConfig(in_dim=48, out_dim=48), "ti2v.safetensors")


@pytest.mark.parametrize(
    ("config", "first", "last", "message"),
    [
        (I2V, False, False, "needs image_path"),
        (I2V, False, True, "needs image_path"),
        (I2V, True, True, None),
        (CLIP, True, False, None),
        (CLIP, True, True, "was not trained for a last frame"),
        (FLF, True, False, "give last_image_path too"),
        (FLF, True, True, None),
    ],
)
def test_each_kind_of_model_takes_its_pictures(picture, config, first, last, message):
    asked = job(config, image_path=picture if first else None, last_image_path=picture if last else None)
    if message is None:
        check_job(asked, config, {}, merged=False)
        return
    with pytest.raises(WanmoeError, match=message):
        check_job(asked, config, {}, merged=False)


def test_a_picture_that_is_none_is_found_before_the_model_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    for name, message in (("a.png", "not a picture"), ("absent.png", "no such picture")):
        with pytest.raises(WanmoeError, match=message):
            check_job(job(I2V, image_path=tmp_path / name), I2V, {}, merged=False)


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_read(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "x.gates.png").mkdir()
    for name in ("folder.mp4", "x.mp4"):
        with pytest.raises(WanmoeError, match="is a folder"):
            check_job(job(output_path=tmp_path / name), T2V, {}, merged=False)
