"""Adapter files: nothing frozen, everything described, the wrong file refused (traps A3, A5, A8)."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wanmoe.moe_lora import (
    AdapterConfig,
    Expert,
    RouterConfig,
    WanmoeError,
    attach,
    load_adapter,
    save_adapter,
)
from wanmoe.moe_lora.adapter_file import (
    has_router,
    has_time_gate,
    read_adapter,
    read_adapter_info,
    router_of,
)
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT

CONFIG = AdapterConfig(
    blocks=2,
    ffn_blocks=1,
    experts=(Expert(name="milk"), Expert(name="thanks", keywords=("谢谢",))),
    fallback="milk",
)


@pytest.fixture
def saved(dit, tmp_path):
    adapter = attach(dit, CONFIG, RouterConfig(mode="learned", top_k=1))
    for parameter in adapter.parameters().values():
        torch.nn.init.normal_(parameter)
    path = save_adapter(
        adapter,
        tmp_path / "adapter.safetensors",
        stage="b",
        step=7,
        noise_expert="high",
        base_sha256="ab" * 32,
    )
    return adapter, path


def fresh(dit):
    return WanDiT(dit.config)


def test_round_trip_with_experts_router_and_values(saved, dit):
    adapter, path = saved
    loaded = load_adapter(path, fresh(dit), noise_expert="high", base_sha256="ab" * 32)
    assert loaded.experts.names == ["milk", "thanks"] and loaded.experts.fallback == "milk"
    assert loaded.experts.find("谢谢") == {"thanks": 1}
    assert loaded.router_config.top_k == 1
    assert loaded.parameters().keys() == adapter.parameters().keys()
    for name, value in adapter.parameters().items():
        assert torch.equal(loaded.parameters()[name], value), name


def test_the_file_holds_the_adapter_alone(saved):
    adapter, path = saved
    with safe_open(path, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == set(adapter.parameters())
    assert not any(name.endswith((".weight", ".bias")) and not name.startswith("router.") for name in names)
    assert path.stat().st_size < 4 * adapter.count() + 20_000
    info = json.loads(metadata["info"])
    assert (info["noise_expert"], info["stage"], info["step"], info["task"]) == ("high", "b", 7, "t2v")


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_size_on_a14b_is_that_of_17_million_parameters(tmp_path, dtype, width):
    with torch.device("meta"):
        adapter = attach(WanDiT(WanConfig.preset("t2v-A14B")))
    # The live parameters hold nothing, as under ZeRO-3: the values come from elsewhere.
    values = {name: torch.zeros(parameter.shape) for name, parameter in adapter.parameters().items()}
    path = tmp_path / "a14b.safetensors"
    save_adapter(adapter, path, stage="b", step=1, tensors=values, dtype=dtype)
    header = path.stat().st_size - 17_520_640 * width
    assert 0 < header < 60_000
    info, tensors = read_adapter(path)
    assert {name: value.shape for name, value in tensors.items()} == {n: v.shape for n, v in values.items()}
    assert {value.dtype for value in tensors.values()} == {dtype} and info.task == "t2v"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"noise_expert": "low"}, "it belongs to the high noise expert, this model is low"),
        ({"noise_expert": "both"}, "it belongs to the high noise expert, this model is both"),
        ({"base_sha256": "cd" * 32}, "it was trained on base abababababab, this base is cdcdcdcdcdcd"),
    ],
)
def test_another_side_or_base_is_refused_unless_asked_for(saved, dit, arguments, words):
    _, path = saved
    with pytest.raises(WanmoeError, match=words):
        load_adapter(path, fresh(dit), **arguments)
    assert load_adapter(path, fresh(dit), any_base=True, **arguments)


def test_a_model_of_another_shape_is_refused(saved, dit):
    _, path = saved
    narrow = WanDiT(type(dit.config)(**{**vars(dit.config), "ffn_dim": 44}))
    with pytest.raises(WanmoeError, match=r"2 misshapen tensors: blocks.3.ffn.0.base_up"):
        load_adapter(path, narrow)


def test_a_base_model_is_not_an_adapter(dit, tmp_path):
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    with pytest.raises(WanmoeError, match="not a wanmoe adapter"):
        load_adapter(tmp_path / "base.safetensors", fresh(dit))


def test_missing_and_unknown_tensors_are_listed(saved, dit, tmp_path):
    _, path = saved
    with safe_open(path, "pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["blocks.9.self_attn.q.base_up"] = tensors.pop("blocks.3.self_attn.q.base_up")
    save_file(tensors, tmp_path / "other.safetensors", metadata=metadata)
    with pytest.raises(WanmoeError, match=r"1 missing tensors: blocks.3.self_attn.q.base_up"):
        load_adapter(tmp_path / "other.safetensors", fresh(dit))


def test_a_cut_file_is_one_clear_line(saved, dit, tmp_path):
    _, path = saved
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WanmoeError, match=r"cut.safetensors: not a readable safetensors file") as caught:
        load_adapter(cut, fresh(dit))
    assert "\n" not in str(caught.value)


def test_the_description_is_read_from_the_header_alone(saved, monkeypatch):
    _, path = saved
    info = read_adapter(path)[0]

    class Refusing:
        def __init__(self, *args, **kwargs):
            self.handle = opened(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def metadata(self):
            return self.handle.metadata()

    from wanmoe.moe_lora import adapter_file

    opened = adapter_file.safe_open
    monkeypatch.setattr(adapter_file, "safe_open", Refusing)
    assert read_adapter_info(path) == info


def test_a_damaged_description_is_one_line_without_advice_of_a_library(tmp_path):
    bad = tmp_path / "bad.safetensors"
    for info, words in (("{", "it is not JSON"), ('{"step": "x"}', "adapter: Field required; .*step: Input")):
        save_file({"a": torch.ones(1)}, bad, metadata={"format": "wanmoe-adapter/1", "info": info})
        with pytest.raises(
            WanmoeError, match=f"bad.safetensors: its description is damaged: {words}"
        ) as caught:
            read_adapter_info(bad)
        assert "\n" not in str(caught.value) and "http" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    adapter, path = saved
    before = path.read_bytes()

    def full(*_arguments, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanmoe.moe_lora.adapter_file.save_file", full)
    with pytest.raises(WanmoeError, match="No space left on device"):
        save_adapter(adapter, path, stage="b", step=8)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_given_router_replaces_only_the_keys_that_are_set(saved, dit, tmp_path):
    bands = ((0.0, 0.25), (0.5, 0.75))
    adapter = attach(fresh(dit), CONFIG, RouterConfig(mode="learned", top_k=2, temperature=0.4, bands=bands))
    path = save_adapter(adapter, tmp_path / "b.safetensors", stage="c", step=1)
    loaded = load_adapter(path, fresh(dit), router=RouterConfig(top_k=1))
    assert loaded.router_config == adapter.router_config.model_copy(update={"top_k": 1})
    assert (loaded.router_config.mode, loaded.router_config.bands) == ("learned", bands)
    for name, value in adapter.router.named_parameters():
        assert torch.equal(loaded.router.get_parameter(name), value), name
    assert load_adapter(path, fresh(dit)).router_config == adapter.router_config


def test_a_file_for_both_sides_goes_to_either(dit, tmp_path):
    path = save_adapter(attach(dit, CONFIG), tmp_path / "a.safetensors", stage="a", step=1)
    for side in ("high", "low", "both"):
        assert load_adapter(path, fresh(dit), noise_expert=side).count() > 0


def test_a_learned_router_is_never_dropped_in_silence(saved, dit):
    _, path = saved
    with pytest.raises(
        WanmoeError, match=r"adapter.safetensors: it holds a learned router, which router.mode"
    ):
        load_adapter(path, fresh(dit), router=RouterConfig(mode="rule"))


def test_a_file_without_a_router_starts_one_afresh(dit, tmp_path):
    path = save_adapter(attach(dit, CONFIG), tmp_path / "a.safetensors", stage="a", step=1)
    loaded = load_adapter(path, fresh(dit), router=RouterConfig(mode="learned"))
    assert loaded.router is not None and loaded.router.out.weight.abs().sum() > 0
    shutil.rmtree(tmp_path)


NEW_KEYS = {
    "adapter": ("rank_base", "expert_init"),
    "router": ("train_gates", "max_gate", "logit_noise", "first_frame_classes", "time_gate", "ema"),
}


def test_a_file_from_before_the_newer_keys_loads_as_it_was(saved, dit, clip, tmp_path):
    adapter, path = saved
    with safe_open(path, "pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    info = json.loads(metadata["info"])
    for section, keys in NEW_KEYS.items():
        for key in keys:
            del info[section][key]
    old = tmp_path / "old.safetensors"
    save_file(tensors, old, metadata=metadata | {"info": json.dumps(info)})
    loaded = load_adapter(old, fresh(dit), noise_expert="high")
    assert loaded.config == adapter.config and loaded.router_config == adapter.router_config
    assert loaded.time_gate is None
    pooled = torch.randn(2, 12)
    assert torch.equal(loaded.router(pooled), adapter.router(pooled))
    gates = [each.gates(torch.eye(2), clip["t"], tokens=12) for each in (loaded, adapter)]
    assert torch.equal(gates[0].experts, gates[1].experts)


def test_a_learned_time_gate_travels_with_the_file(dit, tmp_path):
    adapter = attach(dit, CONFIG, RouterConfig(time_gate="learned", max_gate=0.9, ema=0.9))
    for parameter in adapter.time_gate.parameters():
        torch.nn.init.normal_(parameter)
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage="b", step=1)
    info, tensors = read_adapter(path)
    assert has_time_gate(tensors) and not has_router(tensors)
    assert {name for name in tensors if name.startswith("router.")} == {
        "router.time_center",
        "router.time_slope",
    }
    loaded = load_adapter(path, fresh(dit))
    assert loaded.router is None and loaded.router_config == adapter.router_config == info.router
    t = torch.rand(3)
    assert torch.equal(loaded.time_gate(t), adapter.time_gate(t))
    joined = load_adapter(path, fresh(dit), router=RouterConfig(mode="learned"))
    assert joined.router is not None and torch.equal(joined.time_gate(t), adapter.time_gate(t))


def test_a_learned_time_gate_is_never_dropped_and_never_made_up(dit, tmp_path):
    learned = RouterConfig(time_gate="learned")
    adapter = attach(dit, CONFIG, learned)
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage="b", step=1)
    with pytest.raises(WanmoeError, match=r"holds a learned time gate, which router.time_gate = 'bands'"):
        load_adapter(path, fresh(dit), router=RouterConfig(time_gate="bands"))
    adapter.time_gate = None
    save_adapter(adapter, path, stage="b", step=1)
    with pytest.raises(WanmoeError, match="says that its time gate is learned, but holds none"):
        load_adapter(path, fresh(dit))
    plain = save_adapter(attach(fresh(dit), CONFIG), tmp_path / "b.safetensors", stage="a", step=1)
    started = load_adapter(plain, fresh(dit), router=learned)
    assert started.time_gate(torch.tensor([0.35])).tolist() == [[0.5, 0.5]]


def test_a_router_is_read_without_a_model(dit, tmp_path):
    config = RouterConfig(
        mode="learned", hidden_dim=6, temperature=0.3, first_frame_classes=3, time_gate="learned"
    )
    adapter = attach(dit, CONFIG, config)
    path = save_adapter(adapter, tmp_path / "a.safetensors", stage="c", step=1)
    info, tensors = read_adapter(path)
    pooled, evidence = torch.randn(2, 12), torch.randn(2, 3)
    router = router_of(info, tensors, path)
    assert torch.equal(router(pooled, None, evidence), adapter.router(pooled, None, evidence))
    with pytest.raises(WanmoeError, match=r"a.safetensors: its router is not the one that it describes"):
        router_of(info, tensors | {"router.out.bias": torch.zeros(7)}, path)
    with pytest.raises(WanmoeError, match=r"a.safetensors: it holds no learned router"):
        router_of(info, {n: v for n, v in tensors.items() if "time" in n}, path)


def test_rank_and_start_of_the_base_travel_with_the_file(dit, tmp_path):
    config = CONFIG.model_copy(update={"rank_base": 6, "expert_init": "base"})
    path = save_adapter(attach(dit, config), tmp_path / "a.safetensors", stage="a", step=1)
    loaded = load_adapter(path, fresh(dit))
    assert loaded.config == config
    assert {linear.base_down.shape[0] for linear in loaded.modules.values()} == {6}
