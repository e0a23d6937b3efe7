"""A side on and off its device, exact and merged."""

import pytest
import torch

from wanmoe.infer.side import Cast, Denoiser, Side
from wanmoe.moe_lora import RouterConfig, WanmoeError
from wanmoe.moe_lora.adapter import AdapterConfig, attach
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT

CONFIG = WanConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, text_dim=12, text_len=8, freq_dim=16)
CPU = torch.device("cpu")
MIX = torch.tensor([0.7, 0.0, 0.3, 0.0])


def model(dtype=torch.float32):
    torch.manual_seed(0)
    dit = WanDiT(CONFIG)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    adapter = attach(dit.to(dtype), AdapterConfig(blocks=2, ffn_blocks=1))
    for parameter in adapter.parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit, adapter


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 16, 2, 4, 6, generator=generator), [torch.randn(5, 12, generator=generator)]


def run(side, inputs, experts=MIX, t=0.9, cast=None, **alphas):
    x, context = inputs
    alphas = {"alpha_base": 0.7, "alpha_expert": 1.2} | alphas
    with torch.no_grad():
        return Denoiser(cast or Cast(4), side, experts, 12, **alphas)(x, torch.tensor([t]), context)


class CardSide(Side):
    """A second copy in host memory stands for the one on a card."""

    def _copy(self, tensor):
        return tensor.clone()


def places(side):
    return [tensor.data_ptr() for tensor in side.dit.parameters()]


def test_weights_come_to_the_device_and_are_given_back_to_the_bit():
    dit, adapter = model()
    before = [p.clone() for p in dit.parameters()]
    side = CardSide("low", dit, adapter, CPU, resident=False)
    host = places(side)
    side.enter()
    assert not set(places(side)) & set(host)
    for parameter in dit.parameters():
        parameter.data.mul_(2)  # whatever happens on the card
    side.leave()
    assert places(side) == host  # no copy travelled back
    assert all(map(torch.equal, dit.parameters(), before))


def test_a_resident_side_stays():
    side = CardSide("low", *model(), CPU)
    host = places(side)
    side.enter()
    assert places(side) == host
    side.leave()
    assert places(side) == host


def test_only_one_side_is_on_the_device_at_a_time():
    low, high = (CardSide(name, *model(), CPU, resident=False) for name in ("low", "high"))
    cast, host = Cast(4), [places(low), places(high)]

    def there():
        return [places(side) != home for side, home in zip((low, high), host, strict=True)]

    cast.bring(high)
    assert there() == [False, True]
    cast.bring(low)
    assert there() == [True, False]
    cast.clear()
    assert there() == [False, False]


@pytest.mark.parametrize("t", [0.9, 0.4, 0.1])
def test_merged_weights_give_what_the_adapter_gives(inputs, t):
    exact = run(Side("low", *model(), CPU), inputs, t=t)
    cast = Cast(4)
    side = Side("low", *model(), CPU, merged=True)
    merged = run(side, inputs, t=t, cast=cast)
    torch.testing.assert_close(merged, exact, rtol=0, atol=2e-5)
    assert not torch.equal(merged, exact)
    (error,) = cast.errors.values()
    assert 0 < error < 1e-5
    side.unmerge()
    frozen = dict(model()[0].named_parameters())
    assert all(torch.equal(p, frozen[name]) for name, p in side.dit.named_parameters())


def test_merging_follows_the_bands_and_the_request(inputs):
    side = Side("low", *model(), CPU, merged=True)
    exact = Side("low", *model(), CPU)
    cast = Cast(4)
    for experts, t in ((MIX, 0.9), (MIX, 0.4), (MIX, 0.45), (torch.eye(4)[1], 0.8), (MIX, 0.9)):
        found, truth = run(side, inputs, experts, t, cast), run(exact, inputs, experts, t)
        cast.step += 1
        torch.testing.assert_close(found, truth, rtol=0, atol=2e-5)
    assert len(cast.errors) == 3  # two bands of the mix, one of the other expert
    assert [record.t for record in cast.records] == pytest.approx([0.9, 0.4, 0.45, 0.8, 0.9])


def test_the_error_of_merging_into_bf16_is_found_and_said(inputs, caplog):
    cast = Cast(4)
    with caplog.at_level("INFO", logger="wanmoe.infer"):
        run(Side("low", *model(torch.bfloat16), CPU, merged=True), inputs, cast=cast)
    (error,) = cast.errors.values()
    assert 1e-4 < error < 0.1
    assert f"{error:.1e}" in caplog.text


def test_merged_weights_of_a_side_that_leaves_are_gone(inputs):
    side = CardSide("low", *model(), CPU, resident=False, merged=True)
    cast = Cast(4)
    first = run(side, inputs, cast=cast)
    cast.clear()
    plain = dict(model()[0].named_parameters())
    assert all(torch.equal(p, plain[name]) for name, p in side.dit.named_parameters())
    assert torch.equal(run(side, inputs, cast=cast), first)


def test_a_merge_that_fails_half_way_is_undone(inputs, monkeypatch):
    side = Side("low", *model(), CPU, merged=True)
    plain = dict(model()[0].named_parameters())
    linear = side.adapter.modules["blocks.2.self_attn.q"]
    side.merge(1.0, [1, 0, 0, 0])

    def fails(*_gates):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(linear, "delta", fails)
    with pytest.raises(RuntimeError):
        side.merge(1.0, [0, 1, 0, 0])
    monkeypatch.undo()
    truth = run(Side("low", *model(), CPU), inputs, torch.eye(4)[0], alpha_base=1.0, alpha_expert=1.0)
    again = run(side, inputs, torch.eye(4)[0], alpha_base=1.0, alpha_expert=1.0)
    torch.testing.assert_close(again, truth, rtol=0, atol=2e-5)
    side.unmerge()
    assert all(torch.equal(p, plain[name]) for name, p in side.dit.named_parameters())


def test_a_side_that_fails_to_enter_is_cleared_all_the_same():
    side, cast = CardSide("low", *model(), CPU, resident=False), Cast(4)
    host, copied = places(side), []

    def copy(tensor):
        if len(copied) == 5:
            raise RuntimeError("out of memory")
        copied.append(tensor)
        return tensor.clone()

    side._copy = copy
    with pytest.raises(RuntimeError):
        cast.bring(side)
    cast.clear()
    assert places(side) == host


def test_merging_keeps_no_second_copy_of_what_waits_in_host_memory(inputs):
    side = CardSide("low", *model(), CPU, resident=False, merged=True)
    host = set(places(side))
    cast = Cast(4)
    run(side, inputs, cast=cast)
    assert all(tensor.data_ptr() in host for tensor in side._plain.values())


def test_experts_that_were_never_trained_are_known():
    dit, adapter = model()
    assert Side("low", dit, adapter, CPU).untrained == ()
    for linear in adapter.modules.values():
        linear.expert_up.data[2] = 0
    assert Side("low", dit, adapter, CPU).untrained == (adapter.experts.names[2],)


def test_the_slope_of_the_output_in_each_alpha_is_the_analytic_one(inputs):
    """Frozen parity: the derivative at alpha_base, alpha_expert by autograd, against central differences."""
    dit, adapter = model()
    dit.double()
    for parameter in adapter.parameters().values():
        parameter.data = parameter.data.double()
    inputs = (inputs[0].double(), [inputs[1][0].double()])
    side = Side("low", dit, adapter, CPU)
    probe = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def output(base, expert):
        return float((run(side, inputs, MIX.double(), alpha_base=base, alpha_expert=expert) * probe).sum())

    alphas = torch.tensor([0.7, 1.2], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.9])
    gates = adapter.gates(MIX[None].double() * alphas[1], t, tokens=12)
    gates = gates._replace(base=alphas[:1])
    value = (dit(inputs[0], t, inputs[1], gates) * probe).sum()
    assert float(value.detach()) == pytest.approx(output(0.7, 1.2), rel=1e-9)
    slopes = torch.autograd.grad(value, alphas)[0].tolist()
    step = 1e-4
    by_base = (output(0.7 + step, 1.2) - output(0.7 - step, 1.2)) / (2 * step)
    by_expert = (output(0.7, 1.2 + step) - output(0.7, 1.2 - step)) / (2 * step)
    assert slopes == pytest.approx([by_base, by_expert], rel=1e-5)
    assert min(map(abs, slopes)) > 1e-3


def test_a_compiled_side_gives_the_same(inputs):
    exact = run(Side("low", *model(), CPU), inputs)
    side = Side("low", *model(), CPU, compiled=True)
    torch.testing.assert_close(run(side, inputs), exact, rtol=0, atol=1e-5)
    other = torch.eye(4)[1]
    torch.testing.assert_close(
        run(side, inputs, other), run(Side("low", *model(), CPU), inputs, other), rtol=0, atol=1e-5
    )


def timed_model():
    """An adapter whose experts have factors of t of their own."""
    dit, _ = model()
    again = WanDiT(CONFIG)
    again.load_state_dict(dit.state_dict(), strict=False)
    adapter = attach(again, AdapterConfig(blocks=2, ffn_blocks=1), RouterConfig(time_gate="learned"))
    adapter.time_gate.center.data.copy_(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    return again, adapter


@pytest.mark.parametrize("resident", [True, False])
def test_a_learned_time_gate_acts_at_every_step_and_is_where_t_is(inputs, resident):
    dit, adapter = timed_model()
    moved = []
    adapter.time_gate.to = lambda device: moved.append(device)
    side = CardSide("low", dit, adapter, CPU, resident=resident)
    assert moved == [CPU]
    cast = Cast(4)
    for t in (0.7, 0.3):
        run(side, inputs, t=t, cast=cast)
        with torch.no_grad():
            expected = MIX * 1.2 * adapter.time_gate(torch.tensor([t]))
        torch.testing.assert_close(cast.records[-1].gates, expected)
        cast.step += 1


def test_merged_weights_are_refused_where_the_gates_change_at_every_step():
    with pytest.raises(WanmoeError, match="has the time gate 'learned', which changes it at every step"):
        Side("low", *timed_model(), CPU, merged=True)
    dit, adapter = model()
    adapter.router_config = RouterConfig(time_gate="contrast")
    with pytest.raises(WanmoeError, match="has the time gate 'contrast', which changes it at every step"):
        Side("low", dit, adapter, CPU, merged=True)
