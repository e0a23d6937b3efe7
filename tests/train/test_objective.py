"""The weighted sum: what each term is given, that it stands alone, and that weight 0 costs nothing."""

import math

import pytest
import torch

from wanmoe.launch.config import parse_config
from wanmoe.moe_lora import AdapterConfig, RouterConfig, WanmoeError, attach, load_vae
from wanmoe.moe_lora.instruments import SURGICAL
from wanmoe.moe_lora.wan.weights import load_dit
from wanmoe.train import losses, routing_losses
from wanmoe.train import objective as objective_module
from wanmoe.train.data.batch import LabelGates, collate
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.losses_decoded import Crop, decoded_temporal_loss
from wanmoe.train.objective import Objective
from wanmoe.train.routed import RoutedDiT, whole_router
from wanmoe.train.stages import STAGES, TERMS, loss_weights, stage_name

EVERY = dict.fromkeys(TERMS, 1.0) | {"roi": 3.0, "identity": 0.5, "entropy": 0.01, "balance": 0.05}
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("lone_group")


@pytest.fixture
def make(base, shards, classifier, config):
    """`make(stage, **objective)`: an objective, its model, and three clips."""

    def build(stage, source=shards, keys=None, router=None, **terms):
        judged = {} if terms.pop("no_classifier", False) else {"classifier": str(classifier)}
        tree = config | {
            "data": config["data"] | {"shards": str(source)},
            "objective": judged | terms,
            "router": {"mode": "learned", **(router or {})},
            "train": config["train"] | {"stage": stage.split("+")[0]} | (keys or {}),
        }
        if stage.startswith("b"):
            tree["train"] |= {"train_router": "+router" in stage, "freeze_base": "+base" not in stage}
        parsed = parse_config(tree, "test")
        assert stage_name(parsed) == stage
        dit = load_dit(base)
        adapter = attach(dit, AdapterConfig(blocks=2), RouterConfig(**tree["router"]))
        for name, parameter in adapter.parameters().items():
            if name.endswith("_up"):
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        data, spec = ShardDataset(source, "train"), STAGES[stage]
        gates = LabelGates(adapter.experts, adapter.router_config, needed=spec.routing != "base")
        own = Objective(
            parsed,
            spec,
            adapter,
            data,
            gates,
            t_range=(0.3, 0.9),
            global_batch=3,
            steps=10,
            caption_dropout=0.0,
            device=CPU,
        )
        batch = collate([data[index] for index in (0, 1, 2)], [0, 1, 2], gates)
        model = RoutedDiT(dit, adapter, spec, overlap="orthogonality" in own.weights)
        return own, model, batch

    return build


def run(own, model, batch, step=0):
    own.open_window([batch], whole_router(model.adapter) if own.learns else None)
    return own(batch, step, torch.float32, lambda inputs: model(*inputs))


def test_the_total_is_the_weighted_sum_of_all_terms(make):
    loss = run(*make("b+router", **EVERY))
    prompts = float(loss.terms.pop("teacher_kl_prompts"))  # weighs as teacher_kl
    assert set(loss.terms) == set(TERMS)
    total = sum(EVERY[name] * float(value) for name, value in loss.terms.items()) + prompts
    assert loss.total.item() == pytest.approx(total, rel=1e-5)
    assert all(math.isfinite(float(value)) and float(value) != 0 for value in loss.terms.values())


@pytest.mark.parametrize("gone", TERMS)
def test_removing_a_term_changes_its_own_alone_and_it_is_not_computed(make, monkeypatch, gone):
    whole = run(*make("b+router", **EVERY))
    own, model, batch = make("b+router", **EVERY | {gone: 0.0})
    called = {
        "roi": (losses, "roi_loss"),
        "identity": (losses, "identity_loss"),
        "temporal": (losses, "temporal_loss"),
        "diffusion": (losses, "flow_matching_loss"),
        "orthogonality": (type(model.adapter), "overlap"),
        "entropy": (routing_losses, "entropy_term"),
        "balance": (routing_losses, "load_balance"),
        "teacher_kl": (routing_losses, "teacher_divergence"),
    }
    owner, name = called[gone]
    monkeypatch.setattr(owner, name, lambda *_: pytest.fail(f"{gone} has weight 0 and was computed"))
    part = run(own, model, batch)
    removed = {gone, "teacher_kl_prompts"} if gone == "teacher_kl" else {gone}
    assert set(part.terms) == set(whole.terms) - removed
    for name, value in part.terms.items():
        assert torch.equal(value, whole.terms[name]), name
    expected = whole.total.item() - EVERY[gone] * sum(float(whole.terms[name]) for name in removed)
    assert part.total.item() == pytest.approx(expected, rel=1e-5)


def test_a_router_without_terms_of_its_own_is_not_asked_for_the_whole_step(make):
    own, model, batch = make("b+router", entropy=0, balance=0, teacher_kl=0)
    own.open_window([batch], None)
    assert own.window is None and set(run(own, model, batch).terms) == {
        "diffusion",
        "roi",
        "identity",
        "temporal",
    }


def test_no_classifier_is_asked_for_without_identity(make, monkeypatch):
    monkeypatch.setattr(objective_module, "load_classifier", lambda *_: pytest.fail("it was read"))
    own, model, batch = make("b", identity=0)
    assert own.classifier is None and "identity" not in run(own, model, batch).terms


@pytest.mark.parametrize("term", ["diffusion", "roi", "identity", "temporal"])
def test_the_gradient_of_every_clip_term_reaches_the_experts(make, term):
    own, model, batch = make("b", **dict.fromkeys(TERMS, 0.0) | {term: 1.0})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = model.adapter.train_only(("experts",))
    run(own, model, batch).total.backward()
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert own.classifier is None or all(p.grad is None for p in own.classifier.parameters())


@pytest.mark.parametrize("term", ["diffusion", "roi", "identity", "temporal", "teacher_kl", "balance"])
def test_the_gradient_of_the_joint_stage_reaches_the_router(make, term):
    own, model, batch = make("b+router", **dict.fromkeys(TERMS, 0.0) | {term: 1.0})
    trained = model.adapter.train_only(("router",))
    run(own, model, batch).total.backward()
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


def test_the_region_weighs_exactly_four_and_the_background_one(make):
    own, model, batch = make("a", roi=3.0)
    inputs, target, _ = own.inputs(batch, 0, torch.float32)
    with torch.no_grad():
        error = losses.squared_error(model(*inputs).v, target)
        loss = run(own, model, batch)
    weighed = error * torch.where(batch.roi > 0, 4.0, 1.0)
    assert batch.roi.any() and not batch.roi.all()
    assert loss.total.item() == pytest.approx(float(weighed.mean()), rel=1e-5)


def test_two_forwards_of_a_step_make_one_window(make):
    """Entropy and balance are those of the joined batch, whichever forward asks."""
    own, model, batch = make("b+router", keys={"accumulation": 2}, **EVERY)
    other = batch._replace(
        positions=[3, 4, 5],
        pooled=batch.pooled.flip(0) * 1.5,
        rule=batch.rule.flip(0),
    )
    own.open_window([batch, other], whole_router(model.adapter))
    first, second = (own(b, 0, torch.float32, lambda inputs: model(*inputs)) for b in (batch, other))
    with torch.no_grad():
        probs = torch.cat([model.router(b.pooled) for b in (batch, other)])
    load = probs.mean(0)
    for loss in (first, second):
        assert float(loss.terms["balance"]) == pytest.approx(float(4 * load.square().sum() - 1), rel=1e-5)
    entropy = float(-torch.xlogy(probs, probs).sum(1).mean())
    expected = (entropy - 0.25 * math.log(4)) ** 2
    assert float(first.terms["entropy"]) == pytest.approx(expected, rel=1e-4)


def test_the_gates_by_label_begin_soft_and_end_sharp(make):
    own, _, batch = make("b", identity=0, soft_start=0.8, soft_until=0.5)
    rows = [own.inputs(batch, step, torch.float32)[0].rule[0] for step in (0, 2, 5, 9)]
    label = batch.rule[0]
    for row, share in zip(rows, (0.8, 0.48, 0.0, 0.0), strict=True):
        torch.testing.assert_close(row, (1 - share) * label + share / 4)


def test_noise_and_t_of_a_clip_depend_on_its_position_alone(make):
    own, _, batch = make("a", t_stratified=True)
    whole = own.inputs(batch, 0, torch.float32)[0]
    alone = batch._replace(positions=[1], latent=batch.latent[1:2], context=batch.context[1:2])
    alone = alone._replace(pooled=batch.pooled[1:2], rule=batch.rule[1:2])
    one = own.inputs(alone, 0, torch.float32)[0]
    assert torch.equal(one.x_t[0], whole.x_t[1]) and torch.equal(one.t[0], whole.t[1])
    low, high = 0.3, 0.9
    places = sorted(int((float(t) - low) / (high - low) * 3) for t in whole.t)
    assert places == [0, 1, 2]  # the shares of a uniform t over a global batch of three


@pytest.fixture(scope="module")
def haar_shards(make_shards, tmp_path_factory):
    """Shards that say that their latents are of the stand-in codec, which can decode them."""
    codec = {"name": "haar", "fingerprint": load_vae("haar").fingerprint, "stand_in": True}
    return make_shards(tmp_path_factory.mktemp("haar") / "clips", codec=codec)


@pytest.mark.parametrize("cells", [24, 3])
def test_terms_on_pictures_are_those_of_the_decoded_crop(
    make, haar_shards, random_classifier, tmp_path, monkeypatch, cells
):
    monkeypatch.setattr(objective_module, "DECODED", (cells, cells))
    judge = random_classifier(tmp_path / "pixels.safetensors", space="pixels")
    weights = dict.fromkeys(TERMS, 0.0) | {"identity": 1.0, "temporal": 1.0}
    where = {"classifier": str(judge), "temporal_on": "pixels", "vae": "haar"}
    own, model, batch = make("b", source=haar_shards, **weights, **where)
    loss = run(own, model, batch)
    inputs, _, latent = own.inputs(batch, 0, torch.float32)
    decode = load_vae("haar").decode
    x0 = losses.predicted_x0(inputs.x_t, model(*inputs).v, inputs.t)
    roi, flow, visible = batch.roi.float(), batch.flow.float(), batch.visible.float()
    seen = own.classifier(decode(x0).clamp(-1, 1), roi)
    expected = losses.identity_loss(seen, batch.rule, inputs.t)
    torch.testing.assert_close(loss.per_clip["identity"], expected.detach(), rtol=1e-5, atol=1e-6)
    cut = Crop(roi, (cells, cells))
    parts = [cut(part) for part in (flow, visible, roi)]
    parts[1] = parts[1] * cut.still_inside(flow)
    expected = decoded_temporal_loss(decode(cut(x0)), decode(cut(latent)), *parts, None)
    assert cut(x0).shape[-1] == min(cells, 4) and float(expected.detach().max()) > 0
    torch.testing.assert_close(loss.per_clip["temporal"], expected.detach(), rtol=1e-5, atol=1e-6)
    for term in ("identity", "temporal"):
        weights = dict.fromkeys(TERMS, 0.0) | {term: 1.0}
        own, model, batch = make("b", source=haar_shards, **weights, **where)
        trained = model.adapter.train_only(("experts",))
        run(own, model, batch).total.backward()
        assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


def test_a_codec_of_other_shards_is_refused(make, random_classifier, tmp_path):
    judge = random_classifier(tmp_path / "pixels.safetensors", space="pixels")
    with pytest.raises(WanmoeError, match=r"objective\.vae = haar: another codec than that of"):
        make("b", classifier=str(judge), identity=0.5, vae="haar")
    with pytest.raises(WanmoeError, match=r"judges pixels, so a codec is needed: set objective\.vae"):
        make("b", classifier=str(judge), identity=0.5)


def test_a_router_that_reads_the_first_frame_is_given_what_the_classifier_says_of_it(
    make, make_shards, tmp_path
):
    source = make_shards(tmp_path / "i2v", image=True)
    own, model, batch = make("b+router", source=source, router={"first_frame_classes": 4}, identity=0)
    inputs, _, latent = own.inputs(batch, 0, torch.float32)
    assert torch.equal(inputs.evidence, own.classifier(latent[:, :, :1], None))
    own.open_window([batch], whole_router(model.adapter))
    probs = model.adapter.router(batch.pooled, evidence=inputs.evidence)
    torch.testing.assert_close(own.window.load, probs.mean(0))
    with pytest.raises(WanmoeError, match=r"is for text-to-video: set it to 0"):
        make("b+router", router={"first_frame_classes": 4})


def test_what_a_term_lacks_is_named_with_a_sample_and_the_way_out(make, make_shards, tmp_path):
    bare = make_shards(tmp_path / "bare", marks=False)
    with pytest.raises(WanmoeError, match=r"12 of 12 clips have no region, e\.g\. train_000_abcdef01.*"):
        make("a", source=bare)
    with pytest.raises(WanmoeError, match=r"no optical flow.*objective\.temporal = 0$"):
        make("b", source=bare, roi=0, identity=0)
    own, model, batch = make("b", source=bare, roi=0, identity=0, temporal=0)
    assert set(run(own, model, batch).terms) == {"diffusion"}


def test_a_missing_classifier_is_asked_for_with_the_command(make):
    with pytest.raises(WanmoeError, match=r"wanmoe train-classifier --shards .* set objective.identity = 0"):
        make("b", no_classifier=True, identity=0.5)
    # By default the term is there when a classifier is.
    own, _, _ = make("b", no_classifier=True)
    assert "identity" not in own.weights


def test_a_classifier_of_other_instruments_is_refused(make, random_classifier, tmp_path):
    path = tmp_path / "other.safetensors"
    random_classifier(path, SURGICAL[:3])
    with pytest.raises(WanmoeError, match="but the experts are Scissors.*train it with the same"):
        make("b", classifier=str(path))


def test_weights_left_out_are_those_of_the_stage(config):
    def weights(stage, **keys):
        tree = config | {"objective": keys, "train": config["train"] | {"stage": stage}}
        parsed = parse_config(tree, "test")
        return loss_weights(parsed, STAGES[stage])

    assert weights("a") == {"diffusion": 1, "roi": 3}
    assert weights("b") == {"diffusion": 1, "roi": 3, "temporal": 0.5}
    with_judge = {"diffusion": 1, "roi": 3, "identity": 0.5, "temporal": 0.5}
    assert weights("b", classifier="classifier.safetensors") == with_judge
    assert weights("c") == {"diffusion": 1, "roi": 1, "teacher_kl": 1, "entropy": 0.05, "balance": 0.1}
    # One section serves all stages: what a stage has no use for is left out.
    assert weights("a", teacher_kl=2.0, balance=1.0, orthogonality=1.0) == {"diffusion": 1, "roi": 3}
    with pytest.raises(WanmoeError, match="every weight under .objective. is 0"):
        weights("a", diffusion=0, roi=0)
