"""Presets and the checks of WanConfig."""

import dataclasses

import pytest

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.wan.config import WanConfig


def test_presets_have_the_published_sizes():
    t2v, i2v = WanConfig.preset("t2v-A14B"), WanConfig.preset("i2v-A14B")
    assert (t2v.dim, t2v.ffn_dim, t2v.num_heads, t2v.num_layers) == (5120, 13824, 40, 40)
    assert (t2v.in_dim, t2v.out_dim, t2v.text_dim, t2v.text_len, t2v.freq_dim) == (16, 16, 4096, 512, 256)
    assert (t2v.patch_size, t2v.eps, t2v.head_dim, t2v.image_channels) == ((1, 2, 2), 1e-6, 128, 0)
    assert i2v == dataclasses.replace(t2v, task="i2v", in_dim=36) and i2v.image_channels == 20
    assert (t2v.boundary, i2v.boundary) == (0.875, 0.900)
    assert WanConfig.preset("i2v-14B") == dataclasses.replace(i2v, image_dim=1280)
    small = WanConfig.preset("t2v-1.3B")
    assert (small.dim, small.ffn_dim, small.num_heads, small.num_layers) == (1536, 8960, 12, 30)
    tiny = WanConfig.preset("tiny")
    assert (tiny.dim, tiny.ffn_dim, tiny.num_heads, tiny.num_layers) == (128, 384, 4, 8)
    assert (tiny.task, tiny.text_dim, tiny.text_len, tiny.freq_dim) == ("t2v", 64, 32, 64)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(WanmoeError, match=r"'t2v-14B'; did you mean 't2v-A14B'\? known: .*tiny"):
        WanConfig.preset("t2v-14B")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"task": "v2v"}, "one of t2v, i2v"),
        ({"dim": 0}, "dim is 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_heads": 3}, "dim 5120 over 3 heads"),
        ({"dim": 40, "num_heads": 40}, "even whole number"),
        ({"freq_dim": 255}, "freq_dim is 255"),
        ({"patch_size": (2, 2)}, "three sizes"),
        ({"task": "i2v"}, "in_dim 16 does not fit task 'i2v'"),
        ({"in_dim": 36}, "in_dim 36 does not fit task 't2v'"),
        ({"in_dim": 8}, "in_dim 8 does not fit"),
        ({"image_dim": -1}, "image_dim is -1"),
        ({"image_dim": 1280}, "image_dim is 1280 for task 't2v'"),
        ({"task": "i2v", "in_dim": 36, "image_positions": 514}, "image_positions is 514 without"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(change, match):
    with pytest.raises(WanmoeError, match=match):
        WanConfig(**change)
