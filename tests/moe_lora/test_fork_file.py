"""Files of the seed fork, made here by their documented layout: names, numbers, what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanmoe.moe_lora import WanmoeError
from wanmoe.moe_lora.fork_file import is_fork, read_fork, survey_fork
from wanmoe.moe_lora.instruments import CHOLEC, SURGICAL

DIM, FFN_DIM, BLOCKS, FFN_BLOCKS = 6, 10, (2, 3), (3,)
FAMILIES = [expert.name for expert in SURGICAL]
TOOLS = [expert.name for expert in CHOLEC]
RANKS = {
    f"blocks.{block}.{linear}": 3 if linear.endswith("q") else 2
    for block in BLOCKS
    for linear in [f"{attn}.{letter}" for attn in ("attn1", "attn2") for letter in "qkvo"]
    + ["ffn.fc1"] * (block in FFN_BLOCKS)
}
CONFIG = {
    "lora_dim": 4,
    "alpha": 2.0,
    "num_experts": 4,
    "expert_names": FAMILIES,
    "target_block_indices": list(BLOCKS),
    "projection_ranks": {"q": 3, "k": 2, "v": 2, "o": 2, "ffn": 2},
    "module_ranks": RANKS,
}


def fork_tensors(
    experts: int = 4, base: bool = True, untrained: tuple[int, ...] = ()
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {}
    for index, (name, rank) in enumerate(RANKS.items()):
        module, d_out = f"lora_moe_{index}", FFN_DIM if "ffn" in name else DIM
        if base:
            tensors[f"{module}.base_lora_down.weight"] = rand(rank, DIM)
            tensors[f"{module}.base_lora_up.weight"] = rand(d_out, rank)
        for expert in range(experts):
            up = rand(d_out, rank) * (expert not in untrained)
            tensors[f"{module}.expert_lora_down.{expert}.weight"] = rand(rank, DIM)
            tensors[f"{module}.expert_lora_up.{expert}.weight"] = up
        tensors[f"{module}.timestep_gate.weight"] = rand(3, 1)
        tensors[f"{module}.timestep_gate.bias"] = rand(3)
        tensors[f"{module}.current_gates"] = rand(experts)
        tensors[f"{module}.current_timestep"] = torch.tensor(0.5)
        tensors[f"{module}.org_module.weight"] = rand(d_out, DIM)
        tensors[f"{module}.org_module.bias"] = rand(d_out)
    tensors["router.ema_gates"] = rand(experts)
    tensors["router.expert_usage_count"] = rand(experts)
    return tensors


def write(path, tensors, config=CONFIG):
    save_file(tensors, path, metadata=None if config is None else {"config": json.dumps(config)})
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "moe.safetensors", fork_tensors())


def original(hybrid):
    return hybrid.replace("attn1", "self_attn").replace("attn2", "cross_attn").replace("ffn.fc1", "ffn.0")


def test_modules_get_original_names_in_the_order_of_module_ranks(file):
    fork, tensors = read_fork(file), load_file(file)
    assert is_fork(file)
    assert list(fork.linears) == [original(name) for name in RANKS]
    assert fork.expert_names == tuple(FAMILIES)
    assert fork.alpha == 2.0
    assert fork.noise_expert is None
    assert fork.untrained == ()
    for index, linear in enumerate(fork.linears.values()):
        module = f"lora_moe_{index}"
        assert linear.base_down.equal(tensors[f"{module}.base_lora_down.weight"])
        assert linear.base_up.equal(tensors[f"{module}.base_lora_up.weight"])
        for expert in range(4):
            assert linear.expert_down[expert].equal(tensors[f"{module}.expert_lora_down.{expert}.weight"])
            assert linear.expert_up[expert].equal(tensors[f"{module}.expert_lora_up.{expert}.weight"])


def test_module_ranks_count_and_not_the_usual_order(tmp_path):
    swapped = dict(reversed(RANKS.items()))
    tensors = {}
    for name, tensor in fork_tensors().items():
        _, _, rest = name.partition("lora_moe_")
        index, _, leaf = rest.partition(".")
        tensors[f"lora_moe_{len(RANKS) - 1 - int(index)}.{leaf}" if rest else name] = tensor
    fork = read_fork(write(tmp_path / "m.safetensors", tensors, {**CONFIG, "module_ranks": swapped}))
    assert list(fork.linears) == [original(name) for name in swapped]
    assert fork.linears["blocks.3.ffn.0"].expert_up.shape == (4, FFN_DIM, 2)


def test_what_is_left_out_is_counted(file):
    notes = "\n".join(read_fork(file).notes)
    frozen = 16 * (DIM * DIM + DIM) + FFN_DIM * DIM + FFN_DIM
    assert f"left out copies of frozen weights: 34 tensors, {frozen:,} values" in notes
    assert "left out timestep gates: 34 tensors" in notes
    assert "router" in notes and ": 2 tensors, 8 values" in notes


def test_copies_of_frozen_weights_are_never_read(file, monkeypatch):
    from wanmoe.moe_lora import fork_file

    read = []
    opened = fork_file.open_weights(file)

    def noting(name, tensor):
        return tensor._replace(read=lambda: (read.append(name), tensor.read())[1])

    counted = opened._replace(tensors={name: noting(name, tensor) for name, tensor in opened.tensors.items()})
    monkeypatch.setattr(fork_file, "open_weights", lambda path: counted)
    read_fork(file)
    assert sorted(read) == sorted(name for name in opened.tensors if "_lora_" in name)


def test_experts_that_were_never_trained_are_named(tmp_path):
    tensors = fork_tensors(6, untrained=(1, 5))
    tensors = {name: t * 0 if "base_lora_up" in name else t for name, t in tensors.items()}
    file = write(
        tmp_path / "tools_low.safetensors", tensors, {**CONFIG, "num_experts": 6, "expert_names": TOOLS}
    )
    fork = read_fork(file)
    assert fork.untrained == ("bipolar", "irrigator")
    assert "expert 'bipolar' is all zero: it was never trained" in fork.notes
    assert "the base adapter is all zero: it was never trained" in fork.notes
    assert fork.noise_expert == "low"


def test_a_file_may_lack_the_base_adapter(tmp_path):
    fork = read_fork(write(tmp_path / "m.safetensors", fork_tensors(base=False)))
    assert all(linear.base_down is None and linear.base_up is None for linear in fork.linears.values())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_the_nested_torch_variant_is_the_same(file, tmp_path, suffix):
    nested = {"config": CONFIG}
    for name, tensor in load_file(file).items():
        module, _, leaf = name.partition(".")
        nested.setdefault(module, {})[leaf] = tensor
    torch.save(nested, tmp_path / f"moe{suffix}")
    ours, theirs = read_fork(file), read_fork(tmp_path / f"moe{suffix}")
    assert is_fork(tmp_path / f"moe{suffix}")
    assert theirs._replace(label="", linears={}) == ours._replace(label="", linears={})
    assert list(ours.linears) == list(theirs.linears)
    for a, b in zip(ours.linears.values(), theirs.linears.values(), strict=True):
        assert all(x.equal(y) for x, y in zip(a, b, strict=True))


YAML = """
lora_moe:
  lora_alpha: 2.0
  num_experts: 4
  expert_names: [Scissors, Hook/Electrocautery, Suction, Other]
  target_blocks: "[2, 3]"
router: {router_top_k: 1}
"""
TOML = """
[lora_moe]
lora_alpha = 2.0
expert_names = ["Scissors", "Hook/Electrocautery", "Suction", "Other"]
target_block_indices = [2, 3]
"""


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", YAML), ("a.toml", TOML), ("a.json", json.dumps(CONFIG))]
)
def test_a_config_file_says_what_the_file_does_not(tmp_path, file, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    bare = write(tmp_path / "bare.safetensors", load_file(file), None)
    fork = read_fork(bare, tmp_path / name)
    assert list(fork.linears) == [original(hybrid) for hybrid in RANKS]
    assert (fork.expert_names, fork.alpha) == (tuple(FAMILIES), 2.0)


def test_the_files_own_config_goes_before_the_config_file(tmp_path, file):
    (tmp_path / "a.yaml").write_text("lora_moe: {alpha: 7.0, expert_names: [a, b, c, d]}")
    fork = read_fork(file, tmp_path / "a.yaml")
    assert (fork.expert_names, fork.alpha) == (tuple(FAMILIES), 2.0)


def test_last_8_is_understood_by_the_width_of_the_model(tmp_path):
    tensors = {}
    for index in range(16):
        tensors[f"lora_moe_{index}.expert_lora_down.0.weight"] = torch.zeros(1, 5120)
        tensors[f"lora_moe_{index}.expert_lora_up.0.weight"] = torch.zeros(5120, 1)
    config = {"alpha": 1, "expert_names": ["a"], "target_blocks": "last_2"}
    names = list(read_fork(write(tmp_path / "m.safetensors", tensors, config)).linears)
    assert (names[0], names[-1]) == ("blocks.38.self_attn.q", "blocks.39.cross_attn.o")


def test_ranks_that_the_fork_was_told_but_did_not_apply_are_a_note(tmp_path):
    told = {name: 16 for name in RANKS}
    fork = read_fork(write(tmp_path / "m.safetensors", fork_tensors(), {**CONFIG, "module_ranks": told}))
    assert (
        "module_ranks states 16 for blocks.2.self_attn.q, which has 3 (17 such); the tensors count"
        in fork.notes
    )


def without(*names):
    return {name: t for name, t in fork_tensors().items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (without("lora_moe_4."), CONFIG, "1 modules are missing: lora_moe_4"),
        (without("lora_moe_16."), CONFIG, "holds 16 modules where its config names 17 linears"),
        (
            without("lora_moe_3.expert_lora_up.2"),
            CONFIG,
            r"lora_moe_3 \(blocks.2.self_attn.o\) has downs of exp",
        ),
        (
            without("lora_moe_3.expert_lora_up.3", "lora_moe_3.expert_lora_down.3"),
            CONFIG,
            "disagree on the number",
        ),
        (without("lora_moe_3.base_lora_up"), CONFIG, "blocks.2.self_attn.o has half a base adapter"),
        (
            fork_tensors() | {"lora_moe_0.expert_lora_up.1.weight": torch.zeros(6, 9)},
            CONFIG,
            "ranks disagree: expert 1",
        ),
        (
            fork_tensors() | {"lora_moe_0.base_lora_up.weight": torch.zeros(6, 9)},
            CONFIG,
            "ranks disagree: base has",
        ),
        (
            fork_tensors() | {"lora_moe_0.dora": torch.zeros(1)},
            CONFIG,
            "1 tensors that the fork does not write: lora",
        ),
        (fork_tensors(), {**CONFIG, "expert_names": TOOLS}, "holds 4 experts where .* names 6"),
        (fork_tensors(), {**CONFIG, "expert_names": ["a", "A", "b", "c"]}, "names must differ"),
        (fork_tensors(), {**CONFIG, "num_experts": 6}, "num_experts = 6"),
        (fork_tensors(), {**CONFIG, "alpha": 0}, "alpha = 0, which must be a number above 0"),
        (fork_tensors(), {**CONFIG, "module_ranks": {"blocks.1.mlp": 4}}, "'blocks.1.mlp', which is none of"),
        (
            fork_tensors(),
            {"alpha": 1.0, "expert_names": FAMILIES},
            "nothing says which linears its 17 modules",
        ),
        (fork_tensors(), {**CONFIG, "expert_names": None}, "does not name its 4 experts"),
        (fork_tensors(), {"expert_names": FAMILIES, "module_ranks": RANKS}, "alpha = None"),
        ({"weight": torch.zeros(1)}, CONFIG, "no LoRA-MoE file of the fork: .* it holds weight"),
    ],
)
def test_a_file_that_does_not_fit_together_is_refused(tmp_path, tensors, config, words):
    with pytest.raises(WanmoeError, match=words):
        read_fork(write(tmp_path / "m.safetensors", tensors, config))


def test_a_missing_expert_is_named_where_the_width_is_to_tell_the_blocks(tmp_path):
    tensors = {name: t for name, t in fork_tensors().items() if ".expert_lora_down.0." not in name}
    config = {"alpha": 2.0, "expert_names": FAMILIES, "target_blocks": "last_8"}
    with pytest.raises(WanmoeError, match="nothing says which linears"):
        read_fork(write(tmp_path / "m.safetensors", tensors, config))
    wide = {
        "lora_moe_0.base_lora_down.weight": torch.zeros(1, 5120),
        "lora_moe_0.expert_lora_down.1.weight": torch.zeros(1, 5120),
        "lora_moe_0.expert_lora_up.1.weight": torch.zeros(5120, 1),
    }
    with pytest.raises(WanmoeError, match="holds 1 modules where its config names 64 linears"):
        read_fork(write(tmp_path / "m.safetensors", wide, config))
    with pytest.raises(WanmoeError, match="nothing says which linears"):
        read_fork(write(tmp_path / "m.safetensors", wide, {**config, "target_blocks": "last_0"}))


def test_a_stated_side_is_normalised_or_refused(tmp_path):
    path = tmp_path / "m_low.safetensors"
    assert read_fork(write(path, fork_tensors(), {**CONFIG, "noise_expert": "HIGH"})).noise_expert == "high"
    write(path, fork_tensors(), {**CONFIG, "noise_expert": "upper"})
    with pytest.raises(WanmoeError, match=r"m_low.safetensors: .*noise expert 'upper'"):
        read_fork(path)
    assert read_fork(path, noise_expert="low").noise_expert == "low"


def test_tensors_show_experts_and_ranks_without_any_config(file, tmp_path):
    path = write(tmp_path / "bare_high.safetensors", fork_tensors(untrained=(2,)), None)
    fork, named = survey_fork(path), read_fork(file)
    assert fork.expert_names == tuple(f"expert {index}" for index in range(4))
    assert fork.untrained == ("expert 2",) and fork.noise_expert == "high" and math.isnan(fork.alpha)
    assert list(fork.linears) == [f"lora_moe_{index}" for index in range(len(RANKS))]
    for bare, linear in zip(fork.linears.values(), named.linears.values(), strict=True):
        assert bare.expert_down.equal(linear.expert_down) and bare.base_up.equal(linear.base_up)
    del (tensors := load_file(path))["lora_moe_3.expert_lora_up.1.weight"]
    with pytest.raises(WanmoeError, match="lora_moe_3 .*downs of experts .*is the file whole"):
        survey_fork(write(path, tensors, None))


def test_garbage_is_refused_and_is_no_fork_file(tmp_path, file):
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"not weights")
        assert not is_fork(tmp_path / name)
        with pytest.raises(WanmoeError, match="not a whole"):
            read_fork(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WanmoeError, match="holds a list"):
        read_fork(tmp_path / "list.pt")
    save_file({"lora_moe_0.x": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"config": "{"})
    with pytest.raises(WanmoeError, match="metadata 'config' is not JSON"):
        read_fork(tmp_path / "b.safetensors")
    assert not is_fork(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "a: [", "as YAML"),
        ("a.toml", "a =", "as TOML"),
        ("a.json", "[]", "found a list"),
        ("a.ini", "", "is a .yaml"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_named(tmp_path, file, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(WanmoeError, match=f"{name}: .*{words}"):
        read_fork(file, tmp_path / name)
