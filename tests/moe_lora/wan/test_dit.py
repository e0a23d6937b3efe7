"""The DiT against the official code and diffusers, and the promises of its two halves."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode

from wanmoe.moe_lora.adapter import AdapterConfig, attach
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.routing import Gates
from wanmoe.moe_lora.wan.block import WanLinear
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import to_diffusers

SMALL = dict(
    dim=96, ffn_dim=160, num_heads=4, num_layers=3, text_dim=40, text_len=24, freq_dim=32
)  # 24 wide heads: 12 pairs, split 4/4/4
ODD = dict(
    dim=80, ffn_dim=112, num_heads=2, num_layers=2, text_dim=24, text_len=16, freq_dim=32
)  # 40 wide heads: 20 pairs, split 8/6/6
T2V = WanConfig(**SMALL)
I2V = WanConfig(task="i2v", in_dim=36, **SMALL)
CLIP = WanConfig(task="i2v", in_dim=36, image_dim=28, **{**SMALL, "text_len": 512})  # Wan2.1 i2v
FLF = WanConfig(task="i2v", in_dim=36, image_dim=28, image_positions=10, **{**SMALL, "text_len": 512})
SHAPES = [(1, 2, 4), (3, 6, 10), (5, 4, 6)]  # latent F, H, W: 2, 45 and 30 tokens


def random_dit(config, *, dtype=torch.float32):
    """Every parameter random and of a useful size, biases, norms and the head included."""
    torch.manual_seed(0)
    dit = WanDiT(config).to(dtype)
    with torch.no_grad():
        for name, p in dit.named_parameters():
            if p.ndim == 1 or name == "img_emb.emb_pos":
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in name and "weight" in name else 0.0))
            elif "modulation" not in name:
                p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5)
    return dit


def inputs(config, shape=(3, 6, 10), batch=1):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.out_dim, *shape, generator=g)
    t = torch.tensor([0.987, 0.321][:batch], dtype=torch.float64)
    context = [torch.randn(n, config.text_dim, generator=g) for n in (7, 11)[:batch]]
    image = None
    if config.image_channels:
        image = torch.randn(batch, config.image_channels, *shape, generator=g)
    return x, t, context, image


def clip_tokens(config, batch=1):
    if not config.image_dim:
        return None
    tokens = config.image_positions or 5
    return torch.randn(batch, tokens, config.image_dim, generator=torch.Generator().manual_seed(2))


def call(dit, x, t, context, image, gates=None):
    return dit(x, t, context, gates, image, clip_tokens(dit.config, len(x)))


def relative_error(a, b):
    assert b.norm() > 0.1 * b.numel() ** 0.5, "a truth near zero would hide a zeroed output"
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def official():
    """`wan.modules.model` of the official package without the package's own heavy imports."""
    spec = importlib.util.find_spec("wan")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the official package (PyPI wan22) is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "wan"}
    for name, folder in (("wan", root), ("wan.modules", root / "modules")):
        stub = types.ModuleType(name)
        stub.__path__ = [str(folder)]
        sys.modules[name] = stub
    model = importlib.import_module("wan.modules.model")

    def attention(q, k, v, k_lens=None, window_size=(-1, -1)):
        """In the dtype given, where the official fallback goes through bf16; no keys are padded here."""
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    model.flash_attention = attention
    yield model
    for name in [name for name in sys.modules if name.split(".")[0] == "wan"]:
        del sys.modules[name]
    sys.modules.update(before)


def official_forward(official, dit, x, t, context, image):
    config = dit.config
    sizes = (
        "dim",
        "ffn_dim",
        "num_heads",
        "num_layers",
        "in_dim",
        "out_dim",
        "text_dim",
        "text_len",
        "freq_dim",
    )
    theirs = official.WanModel(model_type=config.task, **{name: getattr(config, name) for name in sizes})
    theirs.load_state_dict(dit.state_dict())
    tokens = x[0, 0].numel() // 4
    with torch.no_grad():
        y = None if image is None else list(image)
        per_token = (t * 1000)[:, None].expand(-1, tokens)  # [B] is expanded wrongly there when B > 1
        return torch.stack(theirs(list(x), per_token, context, tokens, y))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", [T2V, I2V, WanConfig(**ODD)], ids=["t2v", "i2v", "odd-heads"])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_equals_the_official_code(official, config, shape, batch):
    dit = random_dit(config)
    x, t, context, image = inputs(config, shape, batch)
    with torch.no_grad():
        v = call(dit, x, t, context, image)
    assert v.shape == x.shape and v.dtype == torch.float32
    assert relative_error(v, official_forward(official, dit, x, t, context, image)) <= 1e-5


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", [T2V, I2V, CLIP, FLF], ids=["t2v", "i2v", "wan2.1-i2v", "wan2.1-flf2v"])
def test_equals_diffusers(config, shape, batch):
    dit = random_dit(config)
    clip = clip_tokens(config, batch)
    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=config.image_dim or None,
        added_kv_proj_dim=config.dim if config.image_dim else None,
        pos_embed_seq_len=config.image_positions or None,
    )
    theirs.load_state_dict({to_diffusers(name): p for name, p in dit.state_dict().items()})
    x, t, context, image = inputs(config, shape, batch)
    padded = torch.stack([F.pad(row, (0, 0, 0, config.text_len - len(row))) for row in context])
    full = x if image is None else torch.cat((x, image), 1)
    with torch.no_grad():
        # diffusers takes the tokens of two frames as two rows where it has positions for both.
        pairs = clip.unflatten(1, (2, -1)).flatten(0, 1) if config.image_positions else clip
        truth = theirs(full, t * 1000, padded, pairs, return_dict=False)[0]
        v = call(dit, x, t, padded, image)
        assert relative_error(v, truth) <= 1e-5
        if clip is not None:
            other = dit(x, t, padded, None, image, clip.flip(0, 1, 2))
            assert relative_error(other, truth) > 1e-3, "the image tokens were not looked at"


def test_float64_stays_float64():
    dit = random_dit(T2V)
    x, t, context, image = inputs(T2V)
    single = call(dit, x, t, context, image)
    v = call(dit.double(), x.double(), t, context, image)
    assert v.dtype == torch.float64
    assert 0 < relative_error(single, v) <= 1e-5


def test_bf16_parameters_compute_norms_modulation_and_head_in_float32():
    dit = random_dit(T2V, dtype=torch.bfloat16)
    x, t, context, image = inputs(T2V)
    v = call(dit, x, t, context, image)
    assert v.dtype == torch.float32
    truth = call(dit.float(), x, t, context, image)
    assert relative_error(v, truth) <= 0.05
    state = random_dit(T2V, dtype=torch.bfloat16).prefix(x, t, context)
    assert state.x.dtype == torch.bfloat16 and state.e0.dtype == state.cos.dtype == torch.float32


def test_image_tokens_go_through_a_bf16_model_with_float32_norms():
    dit = random_dit(CLIP)
    x, t, context, image = inputs(CLIP)
    truth = call(dit, x, t, context, image)
    dit.bfloat16()
    for norm in (dit.img_emb.proj[0], dit.img_emb.proj[4]):  # as diffusers keeps them
        norm.float()
    v = call(dit, x, t, context, image)
    assert v.dtype == torch.float32
    assert relative_error(v, truth) <= 0.05
    assert dit.prefix(x, t, context, image, clip_tokens(CLIP)).image.dtype == torch.bfloat16


def test_context_may_be_a_list_or_padded():
    dit = random_dit(T2V)
    x, t, context, _ = inputs(T2V, batch=2)
    padded = torch.stack([F.pad(row, (0, 0, 0, 13 - len(row))) for row in context])
    assert torch.equal(dit(x, t, context), dit(x, t, padded))


class Watch(TorchDispatchMode):
    """Fails on a host sync and notes the shape of every tensor that is made."""

    SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.SYNCS, f"host sync: {func}"
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.shapes.add(tuple(leaf.shape))
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_no_host_sync_and_no_time_modulation_per_token(frozen):
    dit = random_dit(T2V)
    if frozen:
        dit.requires_grad_(False)
        dit.freeze_prefix(2)
        dit.blocks[2].requires_grad_(True)
    x, t, context, image = inputs(T2V, batch=2)
    gates = Gates(torch.rand(2, 4), torch.ones(2), 45)
    with Watch() as watch:
        v = call(dit, x, t, context, image, gates)
        v.square().mean().backward()
    tokens, dim = 45, T2V.dim
    assert (2, 6, dim) in watch.shapes, "the watch saw the modulation"
    per_token = {s for s in watch.shapes if tokens in s and 6 in s and dim in s}
    assert not per_token and (2, tokens, 6 * dim) not in watch.shapes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("first", range(T2V.num_layers + 1))
def test_tail_of_prefix_is_forward_and_its_gradients_are_the_whole_graphs(first, checkpointing):
    dit, split = random_dit(T2V), random_dit(T2V)
    x, t, context, image = inputs(T2V, batch=2)
    truth = call(dit, x, t, context, image)
    truth.square().mean().backward()

    split.requires_grad_(False)
    for module in (*split.blocks[first:], split.head):
        module.requires_grad_(True)
    split.freeze_prefix(first)
    split.checkpointing = checkpointing
    state = split.prefix(x, t, context, image)
    assert not state.x.requires_grad and state.x.grad_fn is None
    v = split.tail(state)
    assert torch.equal(v, truth)
    v.square().mean().backward()
    whole = dict(dit.named_parameters())
    for name, p in split.named_parameters():
        if p.requires_grad:
            assert whole[name].grad.norm() > 0
            assert torch.equal(p.grad, whole[name].grad), name
        else:
            assert p.grad is None, name


def test_first_tail_block_gets_an_input_that_requires_grad_only_when_something_trains():
    dit = random_dit(T2V).requires_grad_(False)
    dit.freeze_prefix(1)
    x, t, context, image = inputs(T2V)
    assert not call(dit, x, t, context, image).requires_grad
    seen = []
    dit.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    dit.blocks[2].ffn[0].weight.requires_grad_(True)
    call(dit, x, t, context, image)
    with torch.no_grad():
        call(dit, x, t, context, image)
    dit.requires_grad_(False)
    gates = Gates(torch.rand(1, 4, requires_grad=True), torch.ones(1), 45)
    call(dit, x, t, context, image, gates)
    assert seen == [True, False, True]


def test_checkpointing_gives_equal_gradients():
    plain, saving = random_dit(T2V), random_dit(T2V)
    saving.checkpointing = True
    x, t, context, image = inputs(T2V, batch=2)
    for dit in (plain, saving):
        call(dit, x, t, context, image).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad.norm() > 0 and torch.equal(a.grad, b.grad), name


class GateSpy(WanLinear):
    """Notes which gates reach it and how many tokens it sees."""

    def forward(self, x, gates=None):
        self.seen = (x.shape[1], gates)
        return super().forward(x, gates)


def test_every_linear_of_prefix_and_tail_gets_its_gates():
    dit = random_dit(T2V)
    dit.first_adapted = 1
    for block in dit.blocks:
        for module in block.modules():
            if isinstance(module, WanLinear):
                module.__class__ = GateSpy
    x, t, context, _ = inputs(T2V, batch=2)
    gates = Gates(torch.rand(6, 4), torch.ones(6), 15)  # one row per latent frame
    dit(x, t, context, gates)
    for block in dit.blocks:
        spies = {name: m.seen for name, m in block.named_modules() if isinstance(m, GateSpy)}
        assert len(spies) == 10
        for name, (tokens, got) in spies.items():
            text = name in ("cross_attn.k", "cross_attn.v")
            assert tokens == (T2V.text_len if text else 45)
            if text:
                assert got.experts.shape == (2, 4) and got.tokens_per_row == T2V.text_len
            else:
                assert got is gates


def test_a_frozen_base_adapter_before_the_split_acts_without_a_graph():
    whole, split = random_dit(T2V).requires_grad_(False), random_dit(T2V).requires_grad_(False)
    names = ("blocks.0.self_attn.q", "blocks.0.cross_attn.k", "blocks.0.cross_attn.v", "blocks.1.ffn.2")
    config = AdapterConfig(blocks=1, base_ranks=dict.fromkeys(names, 3))
    adapters = [attach(dit, config) for dit in (whole, split)]
    for adapter in adapters:
        torch.manual_seed(3)
        for module in adapter.modules.values():
            module.base_up.data.normal_()
    whole.first_adapted, whole.prefix_frozen = 0, False
    adapters[1].train_only(("experts",))
    assert split.first_adapted == 2
    x, t, context, image = inputs(T2V, batch=2)
    gates = Gates(torch.rand(6, 4, requires_grad=True), torch.rand(6, requires_grad=True), 15)
    truth = call(whole, x, t, context, image, gates)
    state = split.prefix(x, t, context, gates=gates)
    assert state.x.grad_fn is None
    torch.testing.assert_close(split.tail(state, gates), truth, rtol=1e-5, atol=1e-5)
    bare = split.prefix(x, t, context)
    with pytest.raises(WanmoeError, match="give prefix"):
        split.tail(bare, gates)
    without = split.tail(bare._replace(gated=True), gates)
    assert relative_error(without, truth) > 1e-3, "the base adapter of the prefix did nothing"


@pytest.mark.parametrize(
    ("name", "count", "tensors"),
    [
        ("t2v-A14B", 14_288_491_584, 1095),
        ("i2v-A14B", 14_288_901_184, 1095),
        ("i2v-14B", 16_394_878_784, 1303),
        ("t2v-1.3B", 1_418_996_800, 825),
    ],
)
def test_sizes_of_the_published_models(name, count, tensors):
    config = WanConfig.preset(name)
    with torch.device("meta"):
        dit = WanDiT(config)
    assert all(p.is_meta for p in dit.parameters()) and not list(dit.buffers())
    assert sum(p.numel() for p in dit.parameters()) == count
    assert len(dit.state_dict()) == tensors
    if tensors == 1095:
        assert sum(p.numel() for p in dit.blocks[0].parameters()) == 351_394_304


def test_a_new_model_starts_as_the_official_one():
    torch.manual_seed(0)
    dit = WanDiT(WanConfig.preset("tiny"))
    q = dit.blocks[0].self_attn.q
    assert q.weight.abs().max() <= (6 / 256) ** 0.5 and q.weight.std() > 0.08
    assert not q.bias.any() and not dit.head.head.weight.any()
    assert abs(dit.text_embedding[0].weight.std().item() - 0.02) < 2e-3
    assert abs(dit.time_embedding[2].weight.std().item() - 0.02) < 2e-3
    assert dit.time_projection[1].weight.std() > 0.04
    assert abs(dit.blocks[0].modulation.std().item() * 128**0.5 - 1) < 0.1


def test_shapes_that_do_not_fit_are_refused():
    dit, i2v = random_dit(T2V), random_dit(I2V)
    x, t, context, _ = inputs(T2V)
    image = torch.zeros(1, 20, 3, 6, 10)
    for match, args in {
        r"expected \[B, 16, F, H, W\]": (x[:, :4], t, context),
        "multiples of 16": (x[..., :9], t, context),
        "one flow time per clip": (x, t.expand(2), context),
        "context holds 2 clips": (x, t, context * 2),
        "at most 24 rows of 40": (x, t, [torch.zeros(25, 40)]),
        "takes none": (x, t, context, None, image),
    }.items():
        with pytest.raises(WanmoeError, match=match):
            dit(*args)
    with pytest.raises(WanmoeError, match="image_latent is missing"):
        i2v(x, t, context)
    with pytest.raises(WanmoeError, match=r"image_latent is \(1, 16"):
        i2v(x, t, context, None, image[:, :16])
    with pytest.raises(WanmoeError, match="image_context was given to a i2v model without CLIP"):
        i2v(x, t, context, None, image, torch.zeros(1, 5, 28))
    for config, clip, match in (
        (CLIP, None, r"image_context is missing; .* \[1, tokens, 28\]"),
        (CLIP, torch.zeros(1, 5, 27), r"image_context is \(1, 5, 27\)"),
        (FLF, torch.zeros(2, 5, 28), r"image_context is \(2, 5, 28\); .* \[1, 10, 28\]"),
        (FLF, torch.zeros(1, 5, 28), r"image_context is \(1, 5, 28\)"),
    ):
        with pytest.raises(WanmoeError, match=match):
            random_dit(config)(x, t, context, None, image, clip)


def test_a_trainable_prefix_cannot_be_frozen():
    dit = random_dit(T2V)
    with pytest.raises(WanmoeError, match="parameters before block 1 require grad"):
        dit.freeze_prefix(1)
    dit.requires_grad_(False)
    dit.blocks[0].ffn[2].bias.requires_grad_(True)
    with pytest.raises(WanmoeError, match=r"^1 parameters before block 1 .*blocks\.0\.ffn\.2\.bias"):
        dit.freeze_prefix(1)
    dit.freeze_prefix(0)
    with pytest.raises(WanmoeError, match=r"not in 0\.\.3"):
        dit.freeze_prefix(4)
