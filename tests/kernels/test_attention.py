"""Attention against its definition; which backend is chosen, and what is refused.

The packages of the other backends are played by stand-ins with the signatures of the real ones, and a card by
its compute capability: what is tested here is the choice and the call, not their kernels.
"""

import inspect
import logging
import sys
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from wanmoe.kernels.attention import BACKENDS, attention, attention_reference, op, request_of

A100, H100, B200, RTX5090, T4 = (8, 0), (9, 0), (10, 0), (12, 0), (7, 5)


def draw(queries=7, keys=5, width=64, dtype=torch.float32, grad=True, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, n, 3, width, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_(grad)
        for n in (queries, keys, keys)
    )


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (45, 13), (1, 5)])
def test_equals_the_definition_and_has_its_gradients(queries, keys):
    g = torch.Generator().manual_seed(0)
    q, k, v = draw(queries, keys, 10, torch.float64)
    weights = (torch.einsum("bqnk,bpnk->bnqp", q, k) / 10**0.5).softmax(-1)
    truth = torch.einsum("bnqp,bpnk->bqnk", weights, v)
    seed = torch.randn(truth.shape, generator=g, dtype=torch.float64)
    for ours in (attention, attention_reference):
        out = ours(q, k, v)
        assert out.shape == (2, queries, 3, 10)
        torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)
        theirs = torch.autograd.grad(truth, (q, k, v), seed, retain_graph=True)
        for found, expected in zip(torch.autograd.grad(out, (q, k, v), seed), theirs, strict=True):
            assert expected.norm() > 0.1
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_tensors_that_do_not_belong_together_are_refused():
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 5, 2, 8)
    for bad in (
        (q[0], k, k),
        (q, k, k[:, :4]),
        (q, k[:, :, :1], k[:, :, :1]),
        (q.expand(2, -1, -1, -1), k, k),
    ):
        with pytest.raises(ValueError, match=r"expected q \[B, Lq, N, K\]"):
            attention(*bad)
    with pytest.raises(ValueError, match="dtypes differ"):
        attention(q.half(), k, k)
    with pytest.raises(ValueError, match="devices differ: q cpu, k meta"):
        attention(q, k.to("meta"), k)


# ---- stand-ins ----


def flash2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
           alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    return attention_reference(q, k, v)


def flash3(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
           window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
           deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
    return attention_reference(q, k, v)


def flash3_of_2024(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    return attention_reference(q, k, v), torch.full(q.shape[:2], float("nan"))


def flash4(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
           window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
           deterministic=False, return_lse=False):  # fmt: skip
    return attention_reference(q, k, v), None


def sage1(
    q, k, v, tensor_layout="HND", is_causal=False, attn_mask=None, sm_scale=None, smooth_k=True, **kwargs
):
    assert tensor_layout == "NHD" and not torch.is_grad_enabled()
    k -= k.mean(dim=1, keepdim=True)  # in place, as version 1.0.6 does
    return attention_reference(q, k, v)


STAND_INS = {"flash2": flash2, "flash3": flash3, "flash4": flash4, "sage": sage1}


class Machine:
    """A machine with a card and packages, as the dispatcher sees it; `calls` are the backends that ran."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.calls: list[str] = []
        self.keywords: dict[str, object] = {}
        for backend in BACKENDS.values():
            if backend.module:
                patch.setitem(sys.modules, backend.module, None)
        self.forget()

    def forget(self) -> None:
        for cached in (op._choose, op._named, op._explain):
            cached.cache_clear()

    def card(self, capability):
        self.patch.setattr(op, "_card", lambda device: capability)

    def install(self, *names, **functions):
        for name in (*names, *functions):
            self.provide(name, functions.get(name, STAND_INS.get(name)))

    def provide(self, name, function):
        def called(*args, **kwargs):
            inspect.signature(function).bind(*args, **kwargs)
            self.calls.append(name)
            self.keywords = kwargs
            return function(*args, **kwargs)

        path = BACKENDS[name].module
        for depth in range(path.count(".") + 1):
            package = ".".join(path.split(".")[: depth + 1])
            if sys.modules.get(package) is None:
                self.patch.setitem(sys.modules, package, types.ModuleType(package))
        module = sys.modules[path]
        module.__path__ = []
        self.patch.setattr(module, BACKENDS[name].function, called, raising=False)
        self.forget()


@pytest.fixture
def machine(monkeypatch):
    machine = Machine(monkeypatch)
    yield machine
    machine.forget()


EVERYTHING = ("flash2", "flash3", "flash4", "sage")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("card", "installed", "chosen"),
    [
        (H100, EVERYTHING, "flash3"),
        (H100, ("flash2", "flash4", "sage"), "sdpa"),
        (H100, (), "sdpa"),
        (A100, EVERYTHING, "sdpa"),
        (B200, EVERYTHING, "sdpa"),
        (T4, EVERYTHING, "sdpa"),
        (None, EVERYTHING, "sdpa"),
    ],
)
def test_auto_is_the_same_with_and_without_gradients(machine, card, installed, chosen, grad):
    machine.card(card)
    machine.install(*installed)
    q, k, v = draw(dtype=torch.bfloat16, grad=grad)
    attention(q, k, v)
    assert machine.calls == ([] if chosen == "sdpa" else [chosen])


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 256), (torch.bfloat16, 60)]
)
def test_auto_leaves_what_flash3_cannot_do_to_sdpa(machine, dtype, width):
    machine.card(H100)
    machine.install("flash3")
    q, k, v = draw(dtype=dtype, width=width)
    attention(q, k, v)
    assert machine.calls == []


def test_auto_says_once_what_it_chose_and_why_not_the_others(machine, caplog):
    machine.card(H100)
    machine.install("flash2", "sage")
    q, k, v = draw(dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="wanmoe.kernels.attention"):
        for _ in range(3):
            attention(q, k, v)
        attention(*draw(width=128, dtype=torch.bfloat16, grad=False))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "auto chose sdpa for tensors on cpu; not " in line
    for part in (
        "flash2: PyTorch's own flash kernel is FlashAttention 2",
        "flash3: flash_attn_interface is not installed (pip install --no-build-isolation 'git+https://",
        "flash4: it is a beta",
        "sage: it quantises",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("name", "card", "function"),
    [
        ("flash2", A100, flash2),
        ("flash3", H100, flash3),
        ("flash3", H100, flash3_of_2024),
        ("flash4", H100, flash4),
        ("flash4", RTX5090, flash4),
    ],
)
def test_a_named_backend_computes_the_definition_with_gradients(machine, name, card, function):
    machine.card(card)
    machine.install(**{name: function})
    ours, twin = draw(dtype=torch.bfloat16), draw(dtype=torch.bfloat16)
    out, truth = attention(*ours, backend=name), attention_reference(*twin)
    assert torch.equal(out, truth) and truth.norm() > 1
    out.sum().backward()
    truth.sum().backward()
    assert machine.calls == [name] and machine.keywords == {"deterministic": False}
    for found, expected in zip(ours, twin, strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_sage_gets_tokens_first_tensors_and_does_not_change_the_keys(machine):
    machine.card((8, 9))
    machine.install("sage")
    q, k, v = draw(dtype=torch.bfloat16, grad=False)
    before = k.clone()
    with torch.no_grad():
        out = attention(q, k, v, backend="sage")
    assert machine.calls == ["sage"]
    assert torch.equal(k, before)
    torch.testing.assert_close(out, attention_reference(q, k, v), rtol=0.05, atol=0.02)


def test_the_deterministic_switch_of_torch_reaches_the_package(machine):
    machine.card(A100)
    machine.install("flash2")
    torch.use_deterministic_algorithms(True)
    try:
        attention(*draw(dtype=torch.bfloat16), backend="flash2")
    finally:
        torch.use_deterministic_algorithms(False)
    assert machine.keywords == {"deterministic": True}


BF16 = {"dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "card", "installed", "given", "words"),
    [
        ("flash3", None, True, BF16, "it needs tensors on an NVIDIA card, these are on cpu"),
        ("flash2", A100, False, BF16, "flash_attn is not installed (pip install flash-attn --no-build"),
        ("flash4", H100, False, BF16, "flash_attn.cute is not installed (pip install --pre flash-attn-4)"),
        ("flash2", A100, True, {}, "it takes torch.float16, torch.bfloat16, not torch.float32"),
        ("flash2", A100, True, BF16 | {"width": 264}, "it takes head widths 1 to 256, not 264"),
        ("flash3", H100, True, BF16 | {"width": 60}, "head widths 8 to 192 in steps of 8, not 60"),
        ("sage", A100, True, BF16 | {"width": 48, "grad": False}, "head widths 64, 96, 128, not 48"),
        ("flash3", A100, True, BF16, "it runs on compute capability 9.0, this card is 8.0"),
        ("flash2", T4, True, BF16, "compute capability 8.x, 9.x, 10.x, 11.x, 12.x, this card is 7.5"),
        ("sage", (8, 7), True, BF16 | {"grad": False}, "compute capability 8.0, 8.6, 8.9, 9.0, 12.0"),
        ("flash4", A100, True, BF16, "its backward runs on compute capability 9.x, 10.x, 11.x, 12.x"),
        ("sage", A100, True, BF16, "it is for inference alone and a gradient is needed"),
    ],
)  # fmt: skip
def test_a_named_backend_that_cannot_is_refused_with_the_way_out(
    machine, name, card, installed, given, words
):
    machine.card(card)
    machine.install(*([name] if installed else []))
    with pytest.raises(ValueError) as caught:
        attention(*draw(**given), backend=name)
    message = str(caught.value)
    assert words in message and message.startswith(f"attention: backend {name!r} does not fit: ")
    assert message.endswith("use backend='sdpa' or 'auto'.")
    assert machine.calls == []


def test_what_has_no_backward_on_a_card_runs_where_none_is_needed(machine):
    machine.card(A100)
    machine.install("flash4")
    q, k, v = draw(dtype=torch.bfloat16)
    with torch.no_grad():
        attention(q, k, v, backend="flash4")
    attention(q.detach(), k.detach(), v.detach(), backend="flash4")
    assert machine.calls == ["flash4", "flash4"]


def test_a_backward_that_cannot_be_deterministic_is_refused_when_that_is_asked_for(machine):
    machine.card(RTX5090)
    machine.install("flash4")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="no deterministic backward on compute capability 12.0"):
            attention(*draw(dtype=torch.bfloat16), backend="flash4")
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_package_built_for_another_torch_is_named_and_passed_over(machine, tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c10\\nmore')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    machine.card(H100)
    q, k, v = draw(dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"installed but does not load: undefined symbol: _ZN3c10 \(pip install"
    ):
        attention(q, k, v, backend="flash3")
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="sdpa"))


def test_a_package_that_lacks_one_of_its_own_dependencies_is_not_called_missing(
    machine, tmp_path, monkeypatch
):
    (tmp_path / "flash_attn_interface.py").write_text("import flash_attn_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    machine.card(H100)
    with pytest.raises(ValueError, match="does not load: No module named 'flash_attn_dependency'"):
        attention(*draw(dtype=torch.bfloat16), backend="flash3")


def test_an_unknown_backend_is_named():
    with pytest.raises(
        ValueError, match="'flash' is unknown; choose from auto, sdpa, flash2, flash3, flash4, sage"
    ):
        attention(*draw(), backend="flash")


def test_an_amd_card_is_not_taken_for_an_nvidia_one(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert request_of(torch.device("cuda"), torch.bfloat16, 128, False).card is None


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, backend=backend) * 2,
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for queries, width in ((7, 8), (7, 16), (9, 16), (11, 32)):
        q, k, v = draw(queries, 5, width)
        out = compiled(q, k, v)
        torch.testing.assert_close(out, attention(q, k, v) * 2)
        found = torch.autograd.grad(out.sum(), (q, k, v))
        for ours, theirs in zip(
            found, torch.autograd.grad(attention(q, k, v).mul(2).sum(), (q, k, v)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            torch.testing.assert_close(compiled(q, k, v), attention(q, k, v) * 2)


@pytest.mark.parametrize(("backend", "ran"), [("auto", "flash3"), ("flash2", "flash2")])
def test_the_compiler_follows_into_a_package(machine, backend, ran):
    torch._dynamo.reset()
    machine.card(H100)
    # Without the wrapper that counts calls, which the compiler would have to follow too.
    for name in ("flash2", "flash3"):
        machine.install(name)
        module = sys.modules[BACKENDS[name].module]
        machine.patch.setattr(module, "flash_attn_func", lambda q, k, v, deterministic, n=name: q * len(n))
    q, k, v = draw(dtype=torch.bfloat16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, backend=backend), q * len(ran))
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_call_recomputes_with_its_backend(machine, use_reentrant):
    machine.card(H100)
    machine.install("flash3")
    q, k, v = draw(dtype=torch.bfloat16)
    checkpoint(attention, q, k, v, use_reentrant=use_reentrant).sum().backward()
    assert machine.calls == ["flash3", "flash3"]
    assert q.grad.norm() > 0 and v.grad.norm() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("queries", "keys", "width"), [(256, 256, 128), (1000, 512, 128), (77, 13, 64)])
def test_on_a_card_each_installed_backend_is_the_definition(name, queries, keys, width):
    device = torch.device("cuda")
    backend = BACKENDS[name]
    training = not backend.module or bool(backend.backward)
    reason = backend.fit(request_of(device, torch.bfloat16, width, training))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    inputs = draw(queries, keys, width, torch.bfloat16, training, device)
    truth_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    truth, out = attention_reference(*truth_inputs), attention(*inputs, backend=name)
    # int8 and fp8 products lose more than bf16 rounding does.
    limit = 0.01 if training else 0.05
    assert (out.double() - truth).norm() < limit * truth.norm()
    if not training:
        return
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    found = torch.autograd.grad(out, inputs, seed)
    for ours, theirs in zip(found, torch.autograd.grad(truth, truth_inputs, seed.double()), strict=True):
        assert theirs.norm() > 0
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()
