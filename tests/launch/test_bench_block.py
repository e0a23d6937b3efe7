"""The adapted block and its peers compute one function: output, and gradients of x and of every adapter."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from wanmoe.launch import bench_peft
from wanmoe.launch.bench_block import block_variants
from wanmoe.moe_lora.adapter import AdapterConfig
from wanmoe.moe_lora.wan.config import WanConfig

CONFIG = WanConfig(dim=48, ffn_dim=80, num_heads=2, text_dim=32, text_len=16, freq_dim=32)
GRID = (2, 3, 4)
OURS = ("wanmoe", "wanmoe compiled", "wanmoe frozen")
PEERS = ("diffusers + PEFT", "diffusers + PEFT compiled")


def build(clips=1, dtype=torch.float32, **more):
    torch._dynamo.reset()
    more.setdefault("compiler", "aot_eager")
    return block_variants(CONFIG, GRID, 7, clips, torch.device("cpu"), dtype, 3, **more)


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("clips", "adapter"),
    [
        (2, None),
        (1, AdapterConfig(blocks=1, ffn_blocks=1, rank_q=3, rank_o=2, ffn_layers=("ffn.0", "ffn.2"))),
    ],
)
def test_all_rows_compute_one_function_with_one_set_of_gradients(clips, adapter):
    rows = build(clips, adapter=adapter)
    assert tuple(rows) == OURS + PEERS
    truth, floor = rows["wanmoe"].forward(), rows["wanmoe frozen"].forward()
    delta, grads = truth - floor, rows["wanmoe"].grads()
    # The adapters matter, and the block does more than hand x on.
    assert relative(truth, floor) > 0.02 and relative(truth, rows["wanmoe"].inputs.x) > 0.5
    linears = 9 if adapter is None else 10
    assert len(grads) == 1 + 4 * linears
    # Tracing takes ten seconds: once is enough.
    compared = ("wanmoe compiled", *PEERS) if adapter is None else PEERS[:1]
    for name in compared:
        assert (rows[name].forward() - truth).norm() < 1e-5 * delta.norm(), name
        found = rows[name].grads()
        assert found.keys() == grads.keys()
        for leaf, expected in grads.items():
            assert expected.norm() > 0, leaf
            assert found[leaf].shape == expected.shape and relative(found[leaf], expected) < 1e-5, (
                name,
                leaf,
            )


def test_the_ranks_are_those_of_a_model_and_the_gates_are_not_trivial():
    row = build()["wanmoe"]
    shapes = {name: tuple(grad.shape) for name, grad in row.grads().items()}
    assert shapes["self_attn.q.base_down"] == (8, 48) and shapes["cross_attn.q.expert_down"] == (4, 8, 48)
    assert shapes["self_attn.o.expert_up"] == (4, 48, 4) and shapes["ffn.0.base_up"] == (80, 4)
    assert row.inputs.gates.experts.tolist() == [[0.5, 0.25, 0.125, 0.0625]]


def test_the_frozen_row_reads_no_adapter_and_passes_on_the_gradient_of_x():
    rows = build()
    x_grad = rows["wanmoe"].grads()["x"]
    grads = rows["wanmoe frozen"].grads()
    assert list(grads) == ["x"] and relative(grads["x"], x_grad) > 0.01
    assert all(leaf.grad is None for leaf in rows["wanmoe"].leaves)


@pytest.mark.parametrize("name", ["wanmoe", "diffusers + PEFT"])
def test_a_step_starts_from_no_gradient_and_a_forward_has_no_graph(name):
    row = build()[name]
    row.step()
    first = [leaf.grad.clone() for leaf in row.leaves]
    row.step()
    for leaf, before in zip(row.leaves, first, strict=True):
        assert torch.equal(leaf.grad, before) and before.norm() > 0
    assert row.forward().grad_fn is None and row.graph().grad_fn is not None


def test_the_seed_draws_weights_and_inputs():
    first, again = build()["wanmoe"], build()["wanmoe"]
    other = block_variants(CONFIG, GRID, 7, 1, torch.device("cpu"), torch.float32, 4)["wanmoe"]
    assert torch.equal(first.forward(), again.forward())
    assert relative(other.forward(), first.forward()) > 0.5


def test_the_peer_shares_the_base_and_rotates_as_diffusers_does():
    rows = build()
    peer = rows["diffusers + PEFT"]
    base = {p.data_ptr() for p in rows["wanmoe"].module.parameters()}
    frozen = [p for p in peer.module.parameters() if not p.requires_grad]
    assert len(frozen) == 27 and {p.data_ptr() for p in frozen} <= base
    theirs = WanRotaryPosEmbed(CONFIG.head_dim, CONFIG.patch_size, 64)
    p, q, r = CONFIG.patch_size
    expected = theirs(torch.empty(1, 16, GRID[0] * p, GRID[1] * q, GRID[2] * r))
    for ours, table in zip(peer.arguments[3], expected, strict=True):
        torch.testing.assert_close(ours, table, rtol=0, atol=1e-6)


def test_in_bf16_the_rows_differ_by_rounding_alone():
    rows = build(dtype=torch.bfloat16)
    exact = build()
    truth = exact["wanmoe"].forward()
    for name in ("wanmoe", "diffusers + PEFT"):
        assert rows[name].forward().dtype == torch.bfloat16
        # The weights and inputs themselves are rounded, so this is a bound on the whole, not on the adapters.
        assert relative(rows[name].forward(), truth) < 0.05
        rows[name].step()
        assert all(bool(leaf.grad.isfinite().all()) for leaf in rows[name].leaves)


def test_without_peft_the_rows_of_the_peer_say_why(monkeypatch):
    monkeypatch.setattr(bench_peft, "find_spec", lambda name: None)
    rows = build()
    assert [rows[name].why_not for name in OURS] == [None, None, None]
    for name in PEERS:
        assert rows[name].why_not == "peft is not installed (pip install peft)"
        with pytest.raises(ValueError, match="cannot run: peft is not installed"):
            rows[name].step()


@pytest.mark.gpu
def test_on_a_card_the_compiled_rows_equal_the_eager_ones():
    rows = block_variants(CONFIG, GRID, 7, 1, torch.device("cuda"), torch.bfloat16, 3)
    truth = rows["wanmoe"].grads()
    for name in ("wanmoe compiled", *PEERS):
        for leaf, grad in rows[name].grads().items():
            assert relative(grad, truth[leaf]) < 0.05, (name, leaf)
