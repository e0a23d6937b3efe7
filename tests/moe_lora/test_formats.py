"""What a quantised weight gives back, against the error that its format allows."""

import pytest
import torch

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.formats import FORMATS, PLAIN, format_of


def there_and_back(name, weight, dtype=torch.bfloat16):
    form = FORMATS[name]
    flat = torch.full((form.size(weight.shape, dtype),), 0xAA, dtype=torch.uint8)
    out = torch.full(weight.shape, float("nan"), dtype=dtype)
    form.pack(weight.to(dtype), flat)
    form.unpack(flat, out)
    return out


def needs(name):
    if name == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 takes bitsandbytes")


# Relative errors of values of a normal distribution, and what a value takes.
@pytest.mark.parametrize(
    ("name", "error", "bits"), [("fp8", 0.03, 8.1), ("int8", 0.012, 8.1), ("nf4", 0.11, 4.6)]
)
@pytest.mark.parametrize("shape", [(5, 7), (64, 48), (33, 1), (1, 129), (300, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_come_back_within_the_error_of_their_format(name, error, bits, shape, dtype):
    needs(name)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = there_and_back(name, weight, dtype)
    assert float((out.float() - weight.float()).norm() / weight.float().norm()) < error
    if weight.numel() > 10_000:
        assert FORMATS[name].size(weight.shape, dtype) * 8 / weight.numel() < bits


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_row_has_its_own_scale_and_its_largest_value_nearly_stays(name):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1.0], [1e4], [0.0]]
    )
    out = there_and_back(name, weight, torch.float32)
    assert torch.equal(out[3], torch.zeros(64))
    error = (out - weight)[:3].abs().amax(1) / weight[:3].abs().amax(1)
    assert float(error.max()) < (2**-4 if name == "fp8" else 0.5 / 127 * 1.02)


def test_plain_bytes_are_the_weight():
    weight = torch.randn(5, 7).bfloat16()
    assert torch.equal(there_and_back("bf16", weight), weight)
    assert format_of("bf16") is PLAIN


def test_unknown_and_missing_formats_are_one_clear_line(monkeypatch):
    with pytest.raises(WanmoeError, match="unknown format 'int3' of the base; known are bf16, fp8,"):
        format_of("int3")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WanmoeError, match="nf4 takes bitsandbytes; run: pip install"):
        format_of("nf4")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("shape", [(64, 48), (5120, 320), (33, 7)])
def test_a_card_packs_and_unpacks_as_the_cpu_does(name, shape):
    needs(name)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    form = FORMATS[name]
    flat = torch.empty(form.size(weight.shape, weight.dtype), dtype=torch.uint8, device="cuda")
    out = torch.empty_like(weight, device="cuda")
    form.pack(weight.cuda(), flat)
    form.unpack(flat, out)
    expected = there_and_back(name, weight)
    assert float((out.cpu() != expected).float().mean()) < 1e-3  # a value in the middle may go either way
