"""How loud the experts are by noise level: bands, and the smooth factor that is learned (trap A22)."""

import pytest
import torch
from pydantic import ValidationError

from wanmoe.moe_lora import AdapterConfig, RouterConfig, attach
from wanmoe.moe_lora.routing import TimeGate, band

SMALL = AdapterConfig(blocks=2, ffn_blocks=1)
BANDS = RouterConfig().bands


def test_bands_are_off_half_full():
    t = torch.tensor([0.0, 0.19, 0.2, 0.59, 0.6, 1.0])
    assert band(t, BANDS).tolist() == [0, 0, 0.5, 0.5, 1, 1]


@pytest.mark.parametrize("bands", [[], [(0.1, 1.0)], [(0.0, 1.0), (0.5, 1.0), (0.4, 0.0)]])
def test_bands_that_do_not_cover_t_are_refused(bands):
    with pytest.raises(ValidationError, match="must start at t = 0 and rise"):
        RouterConfig(bands=bands)


def test_a_learned_gate_starts_close_to_the_bands():
    t = torch.linspace(0, 1, 101)
    factor = TimeGate(3)(t)
    assert factor.shape == (101, 3) and (factor > 0).all() and (factor < 1).all()
    assert (factor.diff(dim=0) > 0).all()
    assert (factor[:, 0] - band(t, BANDS)).abs().mean() < 0.12
    assert factor[10, 0] < 0.1 and 0.4 < factor[35, 0] < 0.6 and factor[60, 0] > 0.9


def test_its_gradient_is_that_of_finite_differences():
    gate = TimeGate(3).double()
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)

    def factor(center, slope):
        return torch.func.functional_call(gate, {"center": center, "slope": slope}, t)

    assert torch.autograd.gradcheck(factor, (gate.center, gate.slope))


def test_each_expert_has_its_own_factor_in_the_gates_of_every_frame(dit):
    adapter = attach(dit, SMALL, RouterConfig(time_gate="learned"))
    adapter.time_gate.center.data.copy_(torch.tensor([0.1, 0.3, 0.5, 0.9]))
    t = torch.tensor([0.4, 0.8])
    clip = torch.rand(2, 4)
    gates = adapter.gates(clip, t, tokens=12, alpha_expert=0.5)
    torch.testing.assert_close(gates.experts, clip * 0.5 * adapter.time_gate(t))
    frames = torch.rand(2, 3, 4)
    gates = adapter.gates(frames, t, tokens=12)
    torch.testing.assert_close(gates.experts.view(2, 3, 4), frames * adapter.time_gate(t)[:, None])
    assert gates.tokens_per_row == 4


@pytest.mark.parametrize("mode", ["rule", "learned"])
def test_it_belongs_to_the_experts_whoever_routes(dit, clip, mode):
    """Trains with them, frozen without them, and has a gradient from every expert that speaks."""
    plain = attach(type(dit)(dit.config), SMALL, RouterConfig(mode=mode))
    adapter = attach(dit, SMALL, RouterConfig(mode=mode, time_gate="learned"))
    names = {"router.time_center", "router.time_slope"}
    assert adapter.parameters().keys() - plain.parameters().keys() == names
    assert adapter.count() == plain.count() + 8
    assert adapter.count(("experts",)) == plain.count(("experts",)) + 8
    assert adapter.count(("router",)) == plain.count(("router",))
    for name, parameter in adapter.parameters().items():
        if name.endswith("_up"):
            torch.nn.init.normal_(parameter, std=0.1)
    trained = adapter.train_only(("experts",))
    assert names < trained.keys()
    gates = adapter.gates(torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]]), clip["t"], tokens=12)
    dit(**clip, gates=gates).square().mean().backward()
    for parameter in adapter.time_gate.parameters():
        assert (parameter.grad != 0).tolist() == [True, False, True, True]
    assert not names & adapter.train_only(("router",)).keys()
    assert not any(parameter.requires_grad for parameter in adapter.time_gate.parameters())
