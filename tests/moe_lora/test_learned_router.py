"""The learned router and what the model gets of it; its gradients are those of the diffusion loss (traps A4,
A10, A12)."""

import pytest
import torch

from wanmoe.moe_lora import AdapterConfig, RouterConfig, WanmoeError, attach
from wanmoe.moe_lora.routing import LearnedRouter, RuleRouter, cap, learned_gates, pool_text, top_k
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.train.routed import RoutedDiT
from wanmoe.train.stages import STAGES

SMALL = AdapterConfig(blocks=2, ffn_blocks=1)
PROBS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.02, 0.9, 0.03]])


@pytest.mark.parametrize(
    ("gates", "most", "expected"),
    [
        ([0.94, 0.04, 0.02, 0.0], 0.9, [0.9, 0.2 / 3, 0.1 / 3, 0.0]),
        ([0.9, 0.05, 0.05, 0.0], 0.9, [0.9, 0.05, 0.05, 0.0]),  # at the limit, not above it
        ([0.4, 0.3, 0.2, 0.1], 0.9, [0.4, 0.3, 0.2, 0.1]),
        ([1.0, 0.0, 0.0, 0.0], 0.7, [0.7, 0.1, 0.1, 0.1]),  # nothing to go by: evenly
        ([0.7, 0.28, 0.01, 0.01], 0.4, [0.4, 0.4, 0.1, 0.1]),  # what the first leaves fills the second
        ([0.97, 0.01, 0.01, 0.01], 0.25, [0.25, 0.25, 0.25, 0.25]),
        ([0.0, 0.0, 0.0, 0.0], 0.5, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_a_cap_shares_the_excess_and_keeps_the_sum(gates, most, expected):
    torch.testing.assert_close(cap(torch.tensor([gates]), most)[0], torch.tensor(expected))


def test_a_cap_has_finite_gradients_to_logits_that_differ_by_hundreds():
    logits = torch.tensor([[80.0, 0.0, -20.0, -200.0], [300.0, 0.0, 0.0, 0.0]], requires_grad=True)
    capped = cap(logits.softmax(-1), 0.9)
    torch.testing.assert_close(capped.sum(-1), torch.ones(2))
    (capped * torch.arange(4.0)).sum().backward()
    assert logits.grad.isfinite().all()


def test_a_cap_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    logits = (torch.randn(6, 4, dtype=torch.float64) * 3).requires_grad_()
    for most in (0.9, 0.6, 0.4):
        assert torch.autograd.gradcheck(lambda x, most=most: cap(x.softmax(-1), most), logits)


def test_what_is_cut_off_goes_to_the_experts_that_are_kept():
    config = RouterConfig(top_k=2, max_gate=0.9)
    kept = learned_gates(PROBS, config, training=False)
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0, 0], [0.1, 0, 0.9, 0]]))
    # Without an evidence for the second there is no picking by index.
    alone = learned_gates(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), config, training=False)
    torch.testing.assert_close(alone, torch.tensor([[0.1 / 3, 0.9, 0.1 / 3, 0.1 / 3]]))


def test_a_cap_that_cannot_hold_is_refused(dit):
    with pytest.raises(ValueError, match=r"max_gate = 0.9 leaves less than 1 for 1 experts together; set it"):
        RouterConfig(top_k=1, max_gate=0.9)
    assert RouterConfig(top_k=3, max_gate=0.334).max_gate == 0.334
    few = AdapterConfig(blocks=2, experts=SMALL.experts[:1])
    with pytest.raises(WanmoeError, match=r"router.max_gate = 0.6 leaves less than 1 for 1 experts"):
        attach(dit, few, RouterConfig(top_k=2, max_gate=0.6))


def test_training_gates_are_top_k_with_the_gradient_of_all_or_all():
    probs = PROBS.clone().requires_grad_()
    slope = torch.randn(2, 4)
    config = RouterConfig(top_k=2, max_gate=0.9)
    for how in ("straight_through", "soft"):
        chosen = config.model_copy(update={"train_gates": how})
        kept = learned_gates(probs, chosen, training=True)
        wanted = cap(probs, 0.9) if how == "soft" else learned_gates(probs, config, training=False)
        assert torch.equal(kept, wanted)
        (gradient,) = torch.autograd.grad((kept * slope).sum(), probs)
        torch.testing.assert_close(gradient, slope)
        assert torch.equal(
            learned_gates(probs, chosen, training=False), learned_gates(probs, config, training=False)
        )


def test_hints_and_labels_are_never_capped(dit, clip):
    """Exactly one-hot whatever the router's cap (trap A12)."""
    adapter = attach(dit, SMALL, RouterConfig(mode="learned", max_gate=0.7))
    module = RoutedDiT(dit, adapter, STAGES["b"]).train()
    hint = RuleRouter(adapter.experts).route(hint="Suction").expand(2, 4)
    _, probs, kept = module(**clip, pooled=torch.randn(2, 12), rule=hint)[:3]
    assert torch.equal(kept, hint) and torch.equal(probs, hint)


def test_noise_and_evidence_are_arguments():
    torch.manual_seed(0)
    router = LearnedRouter(16, 4, classes=3)
    pooled, noise, evidence = torch.randn(2, 16), torch.randn(2, 4), torch.randn(2, 3)
    assert torch.equal(router(pooled, noise, evidence), router(pooled, noise, evidence))
    assert torch.equal(router(pooled), router(pooled, None, torch.zeros(2, 3)))
    torch.testing.assert_close(
        router(pooled, noise, evidence),
        ((router(pooled, None, evidence).log() * 0.7 + noise) / 0.7).softmax(-1),
    )
    assert not torch.allclose(router(pooled), router(pooled, None, evidence))
    text_alone = LearnedRouter(16, 4)
    assert text_alone.hidden.in_features == 16 and router.hidden.in_features == 19


# ------------------------------------------------------------------------------- through the whole model


def wide_module(dit, stage="c", **router):
    """A double model whose experts, router and time gate say something."""
    router = {"time_gate": "learned"} | router
    config = RouterConfig(mode="learned", hidden_dim=5, first_frame_classes=2, **router)
    adapter = attach(dit.double(), SMALL, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapter.parameters().items():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data.double() if "time" in name else values * 0.4
    if adapter.time_gate is not None:
        adapter.time_gate.center.data += torch.linspace(-0.2, 0.4, 4, dtype=torch.float64)
    adapter.train_only(("experts", "router"))
    return RoutedDiT(dit, adapter, STAGES[stage]).train()


@pytest.fixture
def inputs(clip):
    generator = torch.Generator().manual_seed(2)
    context = [tokens.double() for tokens in clip["context"]]

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": clip["x"].double(),
        "t": torch.tensor([0.45, 0.6], dtype=torch.float64),
        "context": context,
        "pooled": pool_text(context).double(),
        "rule": torch.zeros(2, 4, dtype=torch.float64),
        "noise": draw(2, 4) * 0.3,
        "evidence": draw(2, 2),
    }


def diffusion_loss(module, inputs):
    target = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (module(**inputs)[0] - target).square().mean()


ROUTER_CONFIGS = {
    "soft": {"train_gates": "soft"},
    "soft, capped": {"train_gates": "soft", "top_k": 4, "max_gate": 0.35},
    "all kept": {"top_k": 4},
    "all kept, contrast": {"top_k": 4, "time_gate": "contrast"},
    "all kept, bands": {"top_k": 4, "time_gate": "bands", "floor": 0.2},
}


@pytest.mark.parametrize("router", ROUTER_CONFIGS.values(), ids=ROUTER_CONFIGS)
def test_the_diffusion_loss_reaches_every_router_weight_as_finite_differences_say(dit, inputs, router):
    module = wide_module(dit, **router)
    names = module.adapter.parameters(("experts", "router"))
    weights = {name: value for name, value in names.items() if name.startswith("router.")}
    assert {name.removeprefix("router.") for name in weights} == {
        "hidden.weight",
        "hidden.bias",
        "out.weight",
        "out.bias",
        *(("time_center", "time_slope") if module.time_gate is not None else ()),
    }
    _, probs, kept = module(**inputs)[:3]
    assert torch.equal(probs, kept) == ("max_gate" not in router)
    gradients = torch.autograd.grad(diffusion_loss(module, inputs), list(weights.values()))
    step = 1e-5
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        assert gradient.abs().min() > 0, name
        flat, slopes = weight.data.view(-1), []
        for index in range(flat.numel()):
            kept, losses = float(flat[index]), []
            for shift in (step, -step):
                flat[index] = kept + shift
                with torch.no_grad():
                    losses.append(float(diffusion_loss(module, inputs)))
            flat[index] = kept
            slopes.append((losses[0] - losses[1]) / (2 * step))
        slopes = torch.tensor(slopes, dtype=torch.float64).view_as(gradient)
        assert (gradient - slopes).norm() < 1e-6 * slopes.norm(), name


def test_straight_through_is_top_k_forwards_and_all_experts_backwards(dit, inputs):
    module = wide_module(dit, max_gate=0.8)
    weights = list(module.router.parameters())
    v, probs, kept = module(**inputs)[:3]
    assert torch.equal(kept, learned_gates(probs, module.adapter.router_config, training=False))
    assert (kept > 0).sum(-1).tolist() == [2, 2] and kept.max() <= 0.8
    assert torch.equal(v, module.eval()(**inputs)[0])
    module.train()
    found = torch.autograd.grad(diffusion_loss(module, inputs), weights)
    # The slope of the loss at the gates that were used, those that are 0 too, passed on to all of probs.
    gates = kept.detach().requires_grad_()
    module.expert_gates = lambda *_: (gates, None)
    every = module.adapter.router_config.model_copy(update={"top_k": 4, "max_gate": 1.0})
    module.adapter.router_config = every
    (slope,) = torch.autograd.grad(diffusion_loss(module, inputs), gates)
    assert slope.abs().min() > 0
    probs = module.router(inputs["pooled"], inputs["noise"], inputs["evidence"])
    for one, other in zip(found, torch.autograd.grad(probs, weights, slope), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_two_forwards_of_the_same_arguments_are_equal_and_recompute_too(dit, inputs):
    module = wide_module(dit, logit_noise=0.5)
    losses = [diffusion_loss(module, inputs)]
    torch.manual_seed(1)  # nothing is drawn inside
    losses.append(diffusion_loss(module, inputs))
    module.dit.checkpointing = True
    losses.append(diffusion_loss(module, inputs))
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    first, *others = (torch.autograd.grad(loss, list(module.router.parameters())) for loss in losses)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert not torch.equal(diffusion_loss(module, inputs | {"noise": None}), losses[0])


def test_a_router_without_time_gate_is_as_before(dit, inputs):
    """The defaults in evaluation: softmax, top 2, bands."""
    adapter = attach(WanDiT(dit.config), SMALL, RouterConfig(mode="learned"))
    module = RoutedDiT(adapter.dit, adapter, STAGES["c"]).eval()
    single = {k: v.float() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    single |= {"context": [c.float() for c in inputs["context"]], "noise": None, "evidence": None}
    _, probs, kept = module(**single)[:3]
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))
    assert torch.equal(kept, top_k(probs, 2)) and module.time_gate is None
