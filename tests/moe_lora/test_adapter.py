"""The adapter on the DiT: bit-equality, counts, gates as arguments (traps A1, A4, A9, A10, A13, A14, A15)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wanmoe.moe_lora import AdapterConfig, Expert, Gates, RouterConfig, WanmoeError, attach
from wanmoe.moe_lora.adapter import LoRAMoELinear, start_experts_from_base
from wanmoe.moe_lora.routing import learned_gates
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT

SMALL = AdapterConfig(blocks=2, ffn_blocks=1)


def randomise(adapter, std=0.1):
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters().values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return adapter


def one_hot(adapter, column, t, tokens=12):
    experts = torch.zeros(2, len(adapter.experts))
    experts[:, column] = 1.0
    return adapter.gates(experts, t, tokens=tokens)


def test_a_fresh_adapter_is_bit_equal_to_the_frozen_model(dit, clip):
    frozen = dit(**clip)
    adapter = attach(dit, SMALL)
    assert torch.equal(dit(**clip, gates=one_hot(adapter, 1, clip["t"])), frozen)
    assert torch.equal(dit(**clip, gates=None), frozen)
    randomise(adapter)
    assert not torch.allclose(dit(**clip, gates=one_hot(adapter, 1, clip["t"])), frozen, atol=1e-3)
    assert torch.equal(dit(**clip, gates=None), frozen)


def test_state_dict_names_of_the_base_do_not_change(dit):
    before = set(dit.state_dict())
    attach(dit, SMALL)
    assert before < set(dit.state_dict())
    assert {name.rsplit(".", 1)[1] for name in set(dit.state_dict()) - before} == {
        "base_down",
        "base_up",
        "expert_down",
        "expert_up",
    }


def test_a14b_adapter_has_the_documented_size():
    with torch.device("meta"):
        dit = WanDiT(WanConfig.preset("t2v-A14B"))
    adapter = attach(dit)
    assert adapter.count() == 17_520_640
    assert adapter.count(("base",)) == 3_504_128
    assert len(adapter.modules) == 67
    assert dit.first_adapted == 32


def test_only_the_chosen_parts_train_and_every_one_gets_a_gradient(dit, clip):
    adapter = randomise(attach(dit, SMALL, RouterConfig(mode="learned")))
    for part in ("base", "experts", "router"):
        trained = adapter.train_only((part,))
        for parameter in (*dit.parameters(), *adapter.router.parameters()):
            parameter.grad = None
        probs = adapter.router(torch.stack([c.mean(0) for c in clip["context"]]))
        dit(**clip, gates=adapter.gates(probs, clip["t"], tokens=12)).square().mean().backward()
        everything = dict(dit.named_parameters()) | {
            f"router.{name}": value for name, value in adapter.router.named_parameters()
        }
        touched = {name for name, p in everything.items() if p.grad is not None and p.grad.any()}
        assert touched == set(trained), part
        assert len(trained) == {"base": 34, "experts": 34, "router": 4}[part]


def test_gates_are_those_of_this_call(dit, clip):
    """The same call gives the same output whatever was called before it."""
    adapter = randomise(attach(dit, SMALL))
    first = dit(**clip, gates=one_hot(adapter, 0, clip["t"]))
    other = dit(**clip, gates=one_hot(adapter, 3, clip["t"] * 0.5))
    again = dit(**clip, gates=one_hot(adapter, 0, clip["t"]))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_recomputation_under_checkpointing_sees_the_same_gates(dit, clip):
    adapter = randomise(attach(dit, SMALL))
    trained = adapter.train_only(("experts",))
    gradients = []
    for checkpointing in (False, True):
        dit.checkpointing = checkpointing
        loss = dit(**clip, gates=one_hot(adapter, 1, clip["t"])).square().mean()
        # Another forward in between: gates kept on modules would now be these.
        with torch.no_grad():
            dit(**clip, gates=one_hot(adapter, 2, clip["t"]))
        gradients.append(torch.autograd.grad(loss, list(trained.values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sum(float(g.norm()) for g in gradients[0]) > 0


@pytest.mark.parametrize("which", ["alpha_base", "alpha_expert"])
def test_each_alpha_scales_exactly_its_own_term(dit, clip, which):
    adapter = randomise(attach(dit.double(), SMALL))
    linear = adapter.modules["blocks.3.self_attn.v"]
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    experts = torch.tensor([[0.2, 0.0, 0.8, 0.0], [1.0, 0.0, 0.0, 0.0]])

    def output(**alphas):
        gates = adapter.gates(
            experts, clip["t"], tokens=12, **({"alpha_base": 0, "alpha_expert": 0} | alphas)
        )
        return linear(x, gates)

    nothing, one = output(), output(**{which: 1.0})
    assert (one - nothing).norm() > 1e-3
    # Linear in its own alpha, by finite differences, and untouched by the other.
    torch.testing.assert_close((output(**{which: 1.3}) - one) / 0.3, one - nothing, rtol=1e-6, atol=1e-9)
    down, up, part = (
        (linear.base_down, linear.base_up, torch.ones(2, 1, 1))
        if which == "alpha_base"
        else (linear.expert_down[2], linear.expert_up[2], torch.tensor([0.8, 0.0])[:, None, None])
    )
    expected = part.double() * (x @ down.double().t() @ up.double().t()) * linear.scale_expert
    if which == "alpha_expert":
        first = torch.tensor([0.2, 1.0], dtype=torch.float64)[:, None, None]
        down, up = linear.expert_down[0].double(), linear.expert_up[0].double()
        expected += first * (x @ down.t() @ up.t()) * linear.scale_expert
    torch.testing.assert_close(one - nothing, expected, rtol=1e-5, atol=1e-7)


def test_gates_per_latent_frame_reach_their_own_frames(dit, clip):
    adapter = randomise(attach(dit, SMALL))
    linear = adapter.modules["blocks.3.self_attn.q"]
    x = torch.randn(2, 12, 24)
    per_frame = torch.zeros(2, 2, 4)
    per_frame[:, 0, 0] = per_frame[:, 1, 3] = 1.0
    mixed = linear(x, adapter.gates(per_frame, clip["t"], tokens=12))
    for frame, column in ((0, 0), (1, 3)):
        alone = linear(x, one_hot(adapter, column, clip["t"]))
        torch.testing.assert_close(mixed[:, frame * 6 : frame * 6 + 6], alone[:, frame * 6 : frame * 6 + 6])
    repeated = torch.eye(4)[[1, 2]][:, None].expand(2, 2, 4)
    torch.testing.assert_close(
        dit(**clip, gates=adapter.gates(repeated, clip["t"], tokens=12)),
        dit(**clip, gates=adapter.gates(repeated[:, 0], clip["t"], tokens=12)),
    )


def test_tokens_that_do_not_divide_among_the_frames_are_refused(dit):
    adapter = attach(dit, SMALL)
    with pytest.raises(ValueError, match="12 tokens of a clip do not divide among 5 gate frames"):
        adapter.gates(torch.zeros(2, 5, 4), torch.ones(2), tokens=12)


def test_bands_switch_the_experts_off_at_low_noise(dit, clip):
    adapter = randomise(attach(dit, SMALL))
    clip["t"] = torch.tensor([0.1, 0.1])
    base_only = adapter.gates(torch.zeros(2, 4), clip["t"], tokens=12)
    assert torch.equal(dit(**clip, gates=one_hot(adapter, 1, clip["t"])), dit(**clip, gates=base_only))


def test_the_gate_gradient_equals_finite_differences(dit, clip):
    adapter = randomise(attach(dit.double(), SMALL))
    experts = torch.tensor([[0.2, 0.3, 0.4, 0.1]] * 2, dtype=torch.float64, requires_grad=True)
    clip = clip | {"x": clip["x"].double(), "context": [c.double() for c in clip["context"]]}

    def loss(gates):
        return dit(**clip, gates=adapter.gates(gates, clip["t"], tokens=12)).square().mean()

    (gradient,) = torch.autograd.grad(loss(experts), experts)
    assert gradient.abs().min() > 0
    step = 1e-4
    for column in range(4):
        shift = torch.zeros_like(experts)
        shift[0, column] = step
        with torch.no_grad():
            slope = (loss(experts + shift) - loss(experts - shift)) / (2 * step)
        torch.testing.assert_close(gradient[0, column], slope, rtol=1e-4, atol=1e-8)


class NoHostSync(TorchDispatchMode):
    """Fails when a value of a tensor is read by the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.item,
        ), f"host sync by {func}"
        return func(*args, **(kwargs or {}))


def test_no_host_sync_and_no_control_flow_on_data(dit, clip):
    config = RouterConfig(mode="learned", time_gate="learned", max_gate=0.6)
    adapter = randomise(attach(dit, SMALL, config))
    adapter.train_only(("experts", "router"))
    with NoHostSync():
        probs = adapter.router(torch.stack([c.mean(0) for c in clip["context"]]), torch.randn(2, 4))
        kept = learned_gates(probs, config, training=True)
        dit(**clip, gates=adapter.gates(kept, clip["t"], tokens=12)).square().mean().backward()
    with torch.device("meta"):
        meta = WanDiT(dit.config)
    on_meta = attach(meta, SMALL)
    gates = Gates(torch.zeros(2, 4, device="meta"), torch.ones(2, device="meta"), 12)
    out = meta(clip["x"].to("meta"), clip["t"].to("meta"), [c.to("meta") for c in clip["context"]], gates)
    assert out.is_meta and len(on_meta.modules) == 17


def test_adapter_parameters_are_fp32_on_a_bf16_base(dit, clip):
    adapter = attach(dit.bfloat16(), SMALL)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    assert dit(**clip, gates=one_hot(adapter, 0, clip["t"])).isfinite().all()


@pytest.mark.parametrize("kind", ["rank_dropout", "module_dropout"])
def test_dropout_keeps_the_mean(kind):
    torch.manual_seed(0)
    config = AdapterConfig(blocks=2, **{kind: 0.5})
    linear = LoRAMoELinear(torch.nn.Linear(6, 5), 4, 4, 1, config)
    torch.nn.init.normal_(linear.base_down)
    torch.nn.init.normal_(linear.base_up)
    x, gates = torch.randn(1, 6), Gates(torch.zeros(1, 1), torch.ones(1), 1)
    with torch.no_grad():
        expected = linear.eval()(x, gates)
        linear.train()
        draws = torch.stack([linear(x, gates) for _ in range(4000)])
    assert (draws - draws[0]).abs().max() > 0.1
    torch.testing.assert_close(draws.mean(0), expected, atol=0.15, rtol=0.1)


def test_module_dropout_takes_base_and_experts_of_a_linear_together():
    torch.manual_seed(0)
    linear = LoRAMoELinear(torch.nn.Linear(6, 5), 2, 2, 3, AdapterConfig(blocks=2, module_dropout=0.5))
    for parameter in (linear.base_up, linear.expert_up):
        torch.nn.init.ones_(parameter)
    seen = set()
    for _ in range(40):
        dropped = linear._drop(linear.base_up, linear.expert_up)
        values = {value for up in dropped for value in up.unique().tolist()}
        assert len(values) == 1  # one draw for the whole linear
        seen |= values
    assert seen == {0.0, 2.0}


def test_initial_values_depend_on_seed_and_name_alone(dit):
    first = {n: p.clone() for n, p in attach(dit, SMALL, seed=3).parameters().items()}
    torch.manual_seed(99)
    again = attach(WanDiT(dit.config), SMALL, seed=3).parameters()
    other = attach(WanDiT(dit.config), SMALL, seed=4).parameters()
    name = "blocks.3.self_attn.q.expert_down"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["blocks.2.self_attn.q.expert_down"])


def test_a_second_adapter_is_refused(dit):
    attach(dit, SMALL)
    with pytest.raises(WanmoeError, match="has an adapter already"):
        attach(dit, SMALL)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"fallback": "Othr"}, "unknown expert 'Othr'; nearest is 'Other'"),
        ({"experts": (Expert(name="a"), Expert(name="A"))}, "names must differ"),
        (
            {"experts": (Expert(name="a", keywords=("x",)), Expert(name="b", keywords=("X",)))},
            "keyword 'X' belongs to both 'a' and 'b'",
        ),
        ({"experts": ()}, "adapter.experts is empty"),
    ],
)
def test_experts_that_cannot_be_used_are_refused_at_construction(wrong, words):
    with pytest.raises(ValueError, match=words):
        AdapterConfig(**wrong)


@pytest.mark.parametrize(("blocks", "count"), [("last_2", 2), (3, 3), ([0, 2], 2)])
def test_blocks_by_number_name_and_list(blocks, count):
    config = AdapterConfig.model_validate({"blocks": blocks})
    assert len(config.block_indices(4)) == count


@pytest.mark.parametrize("blocks", [9, [4], []])
def test_blocks_that_do_not_exist_are_refused(dit, blocks):
    with pytest.raises(WanmoeError, match=r"adapter.blocks = .* does not fit a model of 4 blocks"):
        attach(dit, AdapterConfig.model_validate({"blocks": blocks}))


WIDE_BASE = AdapterConfig(
    blocks=1,
    ffn_blocks=0,
    base_ranks={"blocks.0.self_attn.q": 3, "blocks.0.ffn.2": 5, "blocks.3.self_attn.q": 16},
)


def test_a_base_of_its_own_coverage_and_ranks(dit, clip):
    """The frozen model with every delta added to its weights is the truth; experts sit in block 3 alone."""
    adapter = randomise(attach(dit.double(), WIDE_BASE))
    for parameter in adapter.parameters().values():
        parameter.data = parameter.data.double()
    clip = clip | {"x": clip["x"].double(), "context": [c.double() for c in clip["context"]]}
    names = adapter.parameters(("experts",))
    assert len(names) == 16 and all(name.startswith("blocks.3.") for name in names)
    assert adapter.modules["blocks.0.ffn.2"].base_down.shape == (5, 40)
    assert adapter.modules["blocks.3.self_attn.q"].base_down.shape == (16, 24)
    assert adapter.modules["blocks.3.self_attn.q"].expert_down.shape == (4, 8, 24)
    assert not [name for name in dit.state_dict() if "blocks.0" in name and "expert" in name]
    out = dit(**clip, gates=adapter.gates(torch.eye(4)[[2, 2]], clip["t"], tokens=12, alpha_base=0.3))
    for linear in adapter.modules.values():
        linear.weight.data += 0.3 * linear.scale_base * linear.base_up @ linear.base_down
        if linear.experts:
            linear.weight.data += linear.scale_expert * linear.expert_up[2] @ linear.expert_down[2]
    torch.testing.assert_close(out, dit(**clip, gates=None), rtol=1e-7, atol=1e-7)


def test_a_base_before_the_experts_keeps_the_prefix_until_it_trains(dit, clip):
    adapter = randomise(attach(dit, WIDE_BASE))
    gates = adapter.gates(torch.eye(4)[[1, 2]], clip["t"], tokens=12)
    whole = dit(**clip, gates=gates)
    for part, first in (("experts", 3), ("base", 0)):
        trained = adapter.train_only((part,))
        assert dit.first_adapted == first
        assert torch.equal(dit(**clip, gates=gates), whole)
        if part == "experts":
            with pytest.raises(WanmoeError, match=r"give prefix\(\.\.\.\) the gates too"):
                dit.tail(dit.prefix(**clip), gates)
        gradients = torch.autograd.grad(dit(**clip, gates=gates).square().mean(), list(trained.values()))
        assert all(gradient.any() for gradient in gradients), part


def test_base_ranks_of_a_linear_that_is_not_there_are_refused(dit):
    with pytest.raises(WanmoeError, match=r"base_ranks: this model of 4 blocks has no blocks\.7\.ffn\.0"):
        attach(dit, AdapterConfig(blocks=1, base_ranks={"blocks.7.ffn.0": 4}))


def test_one_rank_of_the_base_for_every_linear_but_those_that_have_their_own(dit):
    own = {"blocks.3.self_attn.q": 3, "blocks.0.ffn.2": 5}
    config = AdapterConfig(blocks=2, ffn_blocks=1, rank_base=16, base_ranks=own)
    adapter = attach(dit, config)
    found = {name: linear.base_down.shape[0] for name, linear in adapter.modules.items()}
    assert {name: rank for name, rank in found.items() if rank != 16} == own
    linear = adapter.modules["blocks.3.ffn.0"]
    assert linear.expert_down.shape[:2] == (4, 4)
    assert (linear.scale_base, linear.scale_expert) == (4 / 16, 4 / 4)
    assert config.linears(4) == {
        name: (found[name], linear.expert_down.shape[1] if linear.experts else None)
        for name, linear in adapter.modules.items()
    }


def test_experts_that_start_from_the_base_change_nothing_and_are_left_alone_once_trained(dit, clip):
    adapter = randomise(attach(dit, WIDE_BASE.model_copy(update={"base_ranks": {"blocks.0.ffn.2": 5}})))
    for linear in adapter.modules.values():
        linear.expert_up.data.zero_()
    before = dit(**clip, gates=one_hot(adapter, 1, clip["t"]))
    assert start_experts_from_base(adapter)
    assert torch.equal(dit(**clip, gates=one_hot(adapter, 1, clip["t"])), before)
    for linear in adapter.modules.values():
        assert all(torch.equal(down, linear.base_down) for down in linear.expert_down)
        assert not linear.expert_up.any()
    assert adapter.config.expert_init == "base"
    randomise(adapter)
    kept = adapter.modules["blocks.3.self_attn.q"].expert_down.clone()
    assert not start_experts_from_base(adapter)
    assert torch.equal(adapter.modules["blocks.3.self_attn.q"].expert_down, kept)


def test_experts_of_another_rank_cannot_start_from_the_base(dit):
    adapter = attach(dit, SMALL.model_copy(update={"rank_base": 8}))
    before = {name: value.clone() for name, value in adapter.parameters().items()}
    with pytest.raises(WanmoeError, match=r"blocks.2.self_attn.k has a base of rank 8 and experts of rank 4"):
        start_experts_from_base(adapter)
    assert all(torch.equal(value, before[name]) for name, value in adapter.parameters().items())


def test_the_overlap_of_experts_and_base_is_the_share_of_their_products(dit):
    adapter = attach(dit, AdapterConfig(blocks=2, ffn_blocks=1))
    downs = [(linear.base_down, linear.expert_down) for linear in adapter.modules.values() if linear.experts]

    def truth(*flat):
        """The definition, row by row, of (base, experts) of each linear."""
        shares = []
        for base, experts in zip(flat[::2], flat[1::2], strict=True):
            rows = experts.flatten(0, 1)
            products = sum((row @ other) ** 2 for row in rows for other in base)
            shares.append(products / ((base**2).sum() * (rows**2).sum()))
        return sum(shares) / len(shares)

    double = [weight.detach().double().requires_grad_() for pair in downs for weight in pair]
    expected = truth(*double)
    found = adapter.overlap()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and 0 < found.item() < 1
    found.backward()
    expected.backward()
    single = [weight.grad for pair in downs for weight in pair]
    for one, other in zip(single, (weight.grad for weight in double), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-8)
    # And that gradient is the slope.
    base, experts = double[0].detach(), double[1].detach()
    step, way = 1e-6, torch.randn(experts.shape, generator=torch.Generator().manual_seed(1)).double()
    slope = (truth(base, experts + step * way) - truth(base, experts - step * way)) / (2 * step)
    assert float((double[1].grad * way).sum()) * len(downs) == pytest.approx(float(slope), rel=1e-6)
    # Rows across the base's space overlap nothing.
    with torch.no_grad():
        for base, experts in downs:
            space = torch.linalg.qr(base.T.float()).Q
            experts -= (experts @ space) @ space.T
    assert adapter.overlap().item() < 1e-10


def test_a_floor_keeps_every_expert_on_and_the_band_still_holds(dit):
    adapter = attach(dit, SMALL, RouterConfig(floor=0.25))
    hint = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    for t, factor in ((0.9, 1.0), (0.3, 0.5), (0.1, 0.0)):
        gates = adapter.gates(hint, torch.tensor([t]), tokens=6)
        torch.testing.assert_close(gates.experts, factor * torch.tensor([[0.25, 1.0, 0.25, 0.25]]))
    adapter.router_config = RouterConfig(bands=((0.0, 1.0),))
    exact = adapter.gates(hint, torch.tensor([0.9]), tokens=6)
    assert torch.equal(exact.experts, hint)  # trap A12: without a floor a hint is one-hot to the bit


def test_a_contrast_keeps_the_sum_and_grows_towards_noise(dit):
    """Shared at little noise, then routed: 1 + 3 w for the routed of four, 1 - w for the others."""
    adapter = attach(dit, SMALL, RouterConfig(time_gate="contrast"))
    hint, mix, nothing = [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0] * 4
    for t, w in ((0.1, 0.0), (0.3, 0.0), (0.6, 0.125), (0.9, 0.25), (1.0, 0.25)):
        rows = adapter.gates(torch.tensor([hint, mix, nothing]), torch.full((3,), t), tokens=6).experts
        torch.testing.assert_close(rows[0], torch.tensor([1 - w, 1 + 3 * w, 1 - w, 1 - w]))
        torch.testing.assert_close(rows[1], torch.tensor([1 + w, 1 + w, 1 - w, 1 - w]))
        torch.testing.assert_close(rows[2], torch.ones(4))
        torch.testing.assert_close(rows.sum(1), torch.full((3,), 4.0))
    with pytest.raises(ValueError, match="contrast must rise in t with widths from 0 to 1"):
        RouterConfig(contrast=((0.5, 0.0), (0.2, 1.0)))
