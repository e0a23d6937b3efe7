"""One linear as PEFT runs it, against the specification of the op."""

import pytest
import torch

from wanmoe.kernels.lora_moe import LoRAMoEWeights, lora_moe_linear_reference
from wanmoe.launch import bench_peft
from wanmoe.launch.bench_peft import linear_peers

PARTS = ("base_down", "base_up", "expert_down", "expert_up")


def subject(dtype=torch.float64, bias=True, rows=1):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    weights = LoRAMoEWeights(
        weight=draw(11, 7),
        bias=draw(11) if bias else None,
        base_down=draw(3, 7),
        base_up=draw(11, 3),
        expert_down=draw(4, 2, 7),
        expert_up=draw(4, 11, 2),
        scale_base=0.5,
        scale_expert=1.5,
    )
    base_gates, expert_gates = draw(1).expand(rows), draw(1, 4).expand(rows, 4)
    return weights, base_gates, expert_gates, draw(2, 6, 7)


def reference(weights, base_gates, expert_gates, x):
    """The output, and the gradients of x and the adapters for an output gradient of ones at x's square."""
    leaves = {name: getattr(weights, name).clone().requires_grad_() for name in PARTS}
    x = x.clone().requires_grad_()
    y = lora_moe_linear_reference(
        x,
        weights.weight,
        weights.bias,
        *leaves.values(),
        base_gates,
        expert_gates,
        x.shape[:-1].numel() // len(base_gates),
        scale_base=weights.scale_base,
        scale_expert=weights.scale_expert,
    )
    y.square().sum().backward()
    return y.detach(), {"x": x.grad} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_equals_the_specification_with_its_gradients(bias, rows):
    weights, *gates, x = subject(bias=bias, rows=rows)
    truth, grads = reference(weights, *gates, x)
    delta = truth - torch.nn.functional.linear(x, weights.weight, weights.bias)
    assert delta.norm() > 1
    peers = linear_peers(weights, *gates, compiler="aot_eager")
    assert list(peers) == ["PEFT", "PEFT compiled"]
    for peer in peers.values():
        assert peer.why_not is None
        for leaf in peer.leaves():
            leaf.grad = None
        x_in = x.clone().requires_grad_()
        y = peer(x_in)
        assert (y - truth).norm() < 1e-12 * delta.norm()
        y.square().sum().backward()
        found = {"x": x_in.grad} | peer.grads()
        assert found.keys() == grads.keys()
        for name, expected in grads.items():
            assert expected.norm() > 1
            assert (found[name] - expected).norm() < 1e-12 * expected.norm(), name


def test_the_base_is_shared_and_frozen_and_the_adapters_are_copies_in_its_dtype():
    weights, *gates, _ = subject()
    weights = weights._replace(weight=weights.weight.bfloat16(), bias=weights.bias.bfloat16())
    peer = linear_peers(weights, *gates)["PEFT"]
    assert peer.run.base_layer.weight.data_ptr() == weights.weight.data_ptr()
    assert not peer.run.base_layer.weight.requires_grad and not peer.run.base_layer.bias.requires_grad
    assert len(peer.leaves()) == 10 and {leaf.dtype for leaf in peer.leaves()} == {torch.bfloat16}
    taken = {weights.base_down.data_ptr(), weights.expert_up.data_ptr()}
    assert taken.isdisjoint(leaf.data_ptr() for leaf in peer.leaves())


def test_gates_that_differ_between_rows_have_no_peer():
    weights, base_gates, expert_gates, x = subject(rows=2)
    for gates in (
        (base_gates * torch.tensor([1.0, 2.0]), expert_gates),
        (base_gates, expert_gates * torch.tensor([[1.0], [2.0]])),
    ):
        peers = linear_peers(weights, *gates)
        assert set(peers) == {"PEFT", "PEFT compiled"}
        for peer in peers.values():
            assert "cannot mix experts differently per clip" in peer.why_not
            with pytest.raises(ValueError, match="this peer cannot run: PEFT has one scaling"):
                peer(x)


def test_without_peft_the_peer_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bench_peft, "find_spec", lambda name: None)
    weights, *gates, _ = subject()
    assert linear_peers(weights, *gates)["PEFT"].why_not == "peft is not installed (pip install peft)"
