"""Inputs and comparisons that the tests of the op share."""

import pytest
import torch
import torch.nn.functional as F

from wanmoe.kernels.bench.variants import loop
from wanmoe.kernels.lora_moe import LoRAMoEWeights, lora_moe_linears

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = ("weight", "bias", "base_down", "base_up", "expert_down", "expert_up")


class Case:
    """A group of linears with random values: x [G, T, d_in], everything that can train requires grad."""

    def __init__(
        self,
        outs=(40,),
        *,
        d_in=72,
        rows=3,
        per_row=21,
        ranks=((3, 2), (2, 1), (2, 1)),
        experts=4,
        dtype=torch.float64,
        device=DEVICE,
        frozen=False,
        seed=0,
    ):
        generator = torch.Generator(device).manual_seed(seed)
        wide = torch.promote_types(dtype, torch.float32)

        def draw(*shape, kind=dtype, scale=1.0, grad=True):
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
            return (values * scale).to(kind).requires_grad_(grad)

        self.tokens_per_row = per_row
        self.x = draw(rows, per_row, d_in)
        self.base_gates, self.expert_gates = draw(rows, kind=wide), draw(rows, experts, kind=wide)
        self.linears = [
            LoRAMoEWeights(
                draw(out, d_in, scale=d_in**-0.5, grad=not frozen),
                draw(out, grad=not frozen),
                draw(base, d_in, kind=wide, scale=d_in**-0.5),
                draw(out, base, kind=wide, scale=base**-0.5),
                draw(experts, rank, d_in, kind=wide, scale=d_in**-0.5),
                draw(experts, out, rank, kind=wide, scale=rank**-0.5),
                0.5,
                1.5,
            )
            for out, (base, rank) in zip(outs, ranks, strict=False)
        ]
        self.seeds = [draw(rows, per_row, out, grad=False) for out in outs]

    def leaves(self):
        """Everything that requires grad, by name; without experts there is nothing of theirs."""
        named = {"x": self.x, "base_gates": self.base_gates, "expert_gates": self.expert_gates}
        for j, linear in enumerate(self.linears):
            named |= {f"{part}.{j}": getattr(linear, part) for part in PARTS}
        given = {name: tensor for name, tensor in named.items() if tensor is not None and tensor.numel()}
        return {name: tensor for name, tensor in given.items() if tensor.requires_grad}

    def wide(self):
        """The same values in float64."""
        other = object.__new__(Case)
        other.tokens_per_row = self.tokens_per_row
        for name in ("x", "base_gates", "expert_gates"):
            setattr(other, name, _wide(getattr(self, name)))
        other.linears = [LoRAMoEWeights(*map(_wide, linear[:6]), *linear[6:]) for linear in self.linears]
        other.seeds = [seed.double() for seed in self.seeds]
        return other

    def forward(self, backend):
        """y of each linear; the backend "loop" is what one writes without an op, each product rounded."""
        if backend == "loop":
            rest = self.base_gates, self.expert_gates, self.tokens_per_row
            return [loop(self.x, linear, *rest) for linear in self.linears]
        return lora_moe_linears(
            self.x,
            self.linears,
            self.base_gates,
            self.expert_gates,
            self.tokens_per_row,
            backend=backend,
        )

    def run(self, backend):
        """Deltas (what the adapters add) and gradients by name."""
        ys = self.forward(backend)
        loss = sum((y * seed).sum() for y, seed in zip(ys, self.seeds, strict=True))
        leaves = self.leaves()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        with torch.no_grad():
            plain = [F.linear(self.x, w.weight, w.bias) for w in self.linears]
        deltas = {f"delta.{j}": (y - p).detach() for j, (y, p) in enumerate(zip(ys, plain, strict=True))}
        return deltas | dict(zip(leaves, grads, strict=True))


def _wide(tensor):
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def relative(found, truth):
    """Distance over the norm of the truth; NaN counts as infinitely far."""
    found, truth = found.detach().double(), truth.detach().double()
    error = float((found - truth).norm() / truth.norm())
    return float("inf") if error != error else error


@pytest.fixture
def case():
    return Case


@pytest.fixture(name="relative")
def relative_():
    return relative


@pytest.fixture
def check():
    """check(found, truth, tolerance): every entry of two runs agrees, and none of the truth is zero."""

    def compare(found, truth, tolerance):
        assert found.keys() == truth.keys()
        for name, expected in truth.items():
            assert expected.norm() > 0, name
            assert relative(found[name], expected) < tolerance, name

    return compare
