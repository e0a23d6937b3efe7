"""What each stage trains, held against the live model (traps A1, A6, A7)."""

import pytest
import torch

from wanmoe.moe_lora import AdapterConfig, RouterConfig, WanmoeError, attach
from wanmoe.moe_lora.wan.weights import load_dit
from wanmoe.train.routed import RoutedDiT
from wanmoe.train.stages import STAGES, select_trainable

PARTS = {
    "a": {"base"},
    "b": {"expert"},
    "b+router": {"expert", "router"},
    "b+base": {"base", "expert"},
    "b+base+router": {"base", "expert", "router"},
    "c": {"router"},
}


def adapted(base, mode="learned"):
    dit = load_dit(base)
    return dit, attach(dit, AdapterConfig(blocks=2), RouterConfig(mode=mode))


@pytest.mark.parametrize("stage", PARTS)
def test_a_stage_trains_its_parts_and_nothing_else(base, stage):
    dit, adapter = adapted(base)
    trainable = select_trainable(STAGES[stage], dit, adapter)
    kinds = {"router" if n.startswith("router.") else n.rsplit(".", 1)[1].split("_")[0] for n in trainable}
    assert kinds == PARTS[stage]
    module = RoutedDiT(dit, adapter, STAGES[stage])
    live = {id(p) for p in module.parameters() if p.requires_grad}
    assert live == {id(p) for p in trainable.values()} and live


def test_pretrain_trains_everything(base):
    dit = load_dit(base)
    trainable = select_trainable(STAGES["pretrain"], dit, None)
    assert set(trainable) == set(dit.state_dict())


def test_stages_in_turn_leave_no_leftovers(base):
    dit, adapter = adapted(base)
    for stage in ("a", "b", "c", "a"):
        trainable = select_trainable(STAGES[stage], dit, adapter)
        assert sum(p.requires_grad for p in dit.parameters()) == (0 if stage == "c" else len(trainable))


def test_a_router_that_does_not_exist_is_named(base):
    with pytest.raises(WanmoeError, match="nothing to train: the adapter has no router; set router.mode"):
        select_trainable(STAGES["c"], *adapted(base, mode="rule"))


def test_freezing_after_selection_would_be_noticed(base):
    """The fault that this registry exists for: something freezes the model behind the stage's back."""
    dit, adapter = adapted(base)
    adapter.train_only = lambda parts: {**adapter.parameters(parts)}  # forgets to unfreeze
    with pytest.raises(WanmoeError, match="are not those of the stage"):
        select_trainable(STAGES["b"], dit, adapter)


@pytest.mark.parametrize("stage", ["a", "b", "c"])
def test_every_trained_parameter_gets_a_gradient_once_the_up_projections_have_moved(base, stage):
    dit, adapter = adapted(base)
    trainable = select_trainable(STAGES[stage], dit, adapter)
    for name, parameter in adapter.parameters().items():
        if name.endswith("_up"):
            torch.nn.init.normal_(parameter, std=0.1)
    module = RoutedDiT(dit, adapter, STAGES[stage])
    context = [torch.randn(3, 16), torch.randn(2, 16)]
    rule = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]])
    v = module(torch.randn(2, 16, 2, 4, 4), torch.tensor([0.9, 0.7]), context, torch.randn(2, 16), rule).v
    v.square().mean().backward()
    assert [n for n, p in trainable.items() if p.grad is None or not p.grad.any()] == []
