"""Streamed blocks give what resident ones give, to the bit; no slot is read or written at a wrong time."""

import itertools
import random

import pytest
import torch
from torch import nn

from wanmoe.moe_lora.adapter import AdapterConfig, attach
from wanmoe.moe_lora.block_store import BlockStore, pin
from wanmoe.moe_lora.formats import FORMATS
from wanmoe.moe_lora.ring import BlockRing, ThreadCopies
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import load_dit, save_dit

CPU = torch.device("cpu")
CONFIG = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=6, text_dim=16, text_len=8, freq_dim=16)
ADAPTED = AdapterConfig(blocks=3, ffn_blocks=2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two noise experts."""
    folder, paths = tmp_path_factory.mktemp("bases"), []
    torch.manual_seed(0)
    for name in ("high", "low"):
        dit = WanDiT(CONFIG)
        nn.init.normal_(dit.head.head.weight, std=0.05)
        for block in dit.blocks:
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.2)
        paths.append(folder / f"{name}.safetensors")
        save_dit(dit, paths[-1])
    return paths


def adapted(dit, checkpointing=False):
    """An adapter with random values on a model."""
    adapter = attach(dit, ADAPTED)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters().values():
        parameter.data.normal_(generator=generator).mul_(0.1)
    adapter.train_only(["experts", "base"])
    dit.checkpointing = checkpointing
    return adapter


def resident(path, checkpointing=False, device=CPU):
    dit = load_dit(path)
    return dit, _moved(dit, checkpointing, device)


def _moved(dit, checkpointing, device):
    adapter = adapted(dit, checkpointing)
    dit.to(device)
    return adapter


def streamed(ring, path, stay=(), checkpointing=False, form="bf16"):
    store = BlockStore(ring.device, FORMATS[form], stay)
    dit = load_dit(path, store=store)
    adapter = _moved(dit, checkpointing, ring.device)
    dit.streamed = ring.add(store, list(dit.blocks), dit.first_adapted)
    return dit, adapter


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(2, 16, 2, 4, 4, generator=generator), torch.rand(2, generator=generator)
    return x, t, torch.randn(2, 8, 16, generator=generator), torch.rand(2, 4, generator=generator)


def step(dit, adapter, seed=0, clips=1):
    """(output, gradients) of a step of some forwards and one backward over all of them."""
    outputs = []
    for clip in range(clips):
        x, t, context, experts = (value.to(dit.head.head.weight.device) for value in inputs(seed + clip))
        outputs.append(dit(x, t, context, adapter.gates(experts, t, tokens=8)))
    sum(out.square().mean() for out in outputs).backward()
    gradients = {name: p.grad for name, p in adapter.parameters().items() if p.grad is not None}
    for parameter in adapter.parameters().values():
        parameter.grad = None
    return outputs[-1].detach(), gradients


def same(ours, truth):
    (out, gradients), (other, expected) = ours, truth
    return (
        torch.equal(out, other)
        and gradients.keys() == expected.keys()
        and all(torch.equal(gradients[name], value) for name, value in expected.items())
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("stay", [(), (3, 4, 5), (0, 5), (1,)])
def test_both_noise_experts_are_bit_equal_to_resident_ones_whoever_comes_next(
    paths, checkpointing, slots, stay
):
    ring = BlockRing(CPU, slots)
    models = [streamed(ring, path, stay, checkpointing) for path in paths]
    truths = [resident(path, checkpointing) for path in paths]
    for turn, side in enumerate((0, 0, 1, 0, 1, 1)):
        assert same(step(*models[side], seed=turn), step(*truths[side], seed=turn)), turn
        with torch.no_grad():  # a validation in between, which no backward follows
            x, t, context, _ = inputs(turn)
            assert torch.equal(models[1 - side][0](x, t, context), truths[1 - side][0](x, t, context))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_backward_over_two_forwards(paths, checkpointing):
    ring = BlockRing(CPU)
    ours, truth = streamed(ring, paths[0], (), checkpointing), resident(paths[0], checkpointing)
    assert same(step(*ours, clips=2), step(*truth, clips=2))


def test_a_forward_that_failed_leaves_the_next_one_as_it_was(paths):
    ring = BlockRing(CPU)
    ours, truth = streamed(ring, paths[0]), resident(paths[0])
    x, t, context, experts = inputs(0)

    def fail(module, args):
        raise MemoryError("out of memory")

    for index in (0, 2, 4, 5):
        hook = ours[0].blocks[index].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            ours[0](x, t, context, ours[1].gates(experts, t, tokens=8))
        hook.remove()
        assert same(step(*ours), step(*truth))


def test_streamed_tensors_are_no_parameters_and_read_as_what_the_file_holds(paths):
    """Also while other blocks lie where they were."""
    ring = BlockRing(CPU)
    dit, adapter = streamed(ring, paths[0])
    step(dit, adapter)
    whole = load_dit(paths[0])
    own = {id(p) for p in adapter.parameters().values()}
    assert all(id(p) in own for p in dit.blocks.parameters())
    for index, block in enumerate(whole.blocks):
        for name, value in block.named_parameters():
            owner, _, leaf = name.rpartition(".")
            assert torch.equal(getattr(dit.blocks[index].get_submodule(owner), leaf), value)


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "bf16"])
def test_a_quantised_base_computes_with_exactly_the_unpacked_weights(paths, form):
    if form == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 takes bitsandbytes")
    ring = BlockRing(CPU)
    ours, truth = streamed(ring, paths[0], (1,), form=form), resident(paths[0])
    store = ours[0].streamed.store
    for index, (block, layout) in enumerate(zip(truth[0].blocks, store.layouts, strict=True)):
        for name, piece in layout.pieces.items():
            owner, _, leaf = name.rpartition(".")
            weight = getattr(block.get_submodule(owner), leaf).data
            piece.format.unpack(piece.stored(store.bytes_of(index)), weight)
    assert same(step(*ours), step(*truth))
    assert {name for name, _ in store.errors} == {
        f"blocks.{i}.{name}"
        for i in range(6)
        for name, p in store.layouts[i].pieces.items()
        if p.unpacked >= 0
    }


class Recorded(ThreadCopies):
    """Copies that note which bytes went where."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def start(self, slot, source, after):
        self.sources.append(source.data_ptr())
        return super().start(slot, source, after)


@pytest.mark.parametrize(
    ("stay", "checkpointing", "each"),
    [((3, 4, 5), False, 3), ((), True, 6 + 1), ((), False, 6 + 1), ((0, 1, 2), True, 1 + 1)],
)
def test_a_block_is_copied_once_on_its_way_and_the_last_ones_are_still_there_when_it_turns(
    paths, stay, checkpointing, each
):
    """Of three blocks of the tail the last two are in the slots when the backward begins: it brings one."""
    copies = Recorded()
    ring = BlockRing(CPU, 2, copies)
    model = streamed(ring, paths[0], stay, checkpointing)
    step(*model)
    copies.sources.clear()
    step(*model)
    assert len(copies.sources) == each, (stay, checkpointing)


class Streams:
    """Two queues of work as a card has them, run in an order drawn at random among those that are legal."""

    def __init__(self, chance):
        self.chance, self.queues, self.done = chance, {"copy": [], "compute": []}, set()
        self.slots, self.events = {}, itertools.count()

    # What the ring asks for.

    def start(self, slot, source, after):
        if after is not None:
            self.queues["copy"].append(("wait", after))
        key, tag = slot.data_ptr(), source.data_ptr()
        self.queues["copy"].append(("begin", key, None))  # half of it is there
        self.queues["copy"].append(("begin", key, tag))
        return self._record("copy")

    def mark(self):
        return self._record("compute")

    def wait(self, event):
        self.queues["compute"].append(("wait", event))

    def stall(self):
        return 0.0

    # What a block asks for.

    def compute(self, slot, tag):
        for _ in range(2):
            self.queues["compute"].append(("read", slot, tag))

    def _record(self, name):
        event = next(self.events)
        self.queues[name].append(("record", event))
        return event

    def run(self):
        """Runs all of it; returns reads of a slot that did not hold the block."""
        wrong = 0
        while any(self.queues.values()):
            ready = [
                queue
                for queue in self.queues.values()
                if queue and not (queue[0][0] == "wait" and queue[0][1] not in self.done)
            ]
            assert ready, "both queues wait"
            kind, *what = self.chance.choice(ready).pop(0)
            if kind == "record":
                self.done.add(what[0])
            elif kind == "begin":
                self.slots[what[0]] = what[1]
            elif kind == "read":
                wrong += self.slots.get(what[0]) != what[1]
        return wrong


def visits(chance, tail, blocks):
    """Blocks as a run asks for them: training, validation, forwards that were left half-way."""
    for _ in range(chance.randint(2, 5)):
        turns = chance.random() < 0.6
        until = blocks if chance.random() < 0.8 else chance.randrange(1, blocks)
        for block in range(until):
            yield block, False, turns and block >= tail
        if turns and until == blocks:
            for block in reversed(range(tail, blocks)):
                yield block, True, False


def play(seed, broken=None):
    """Wrong reads of two models in a ring of random size under a random schedule."""
    chance = random.Random(seed)
    blocks, tail = chance.randint(2, 7), chance.randint(0, 2)
    streams = Streams(chance)
    if broken is not None:
        broken(streams)
    ring = BlockRing(CPU, chance.randint(2, 4), streams)
    models = []
    for _ in range(2):
        modules = [nn.Linear(4, 4) for _ in range(blocks)]
        stay = [i for i in range(blocks) if chance.random() < 0.2]
        store = BlockStore(CPU, resident=stay)
        store.lay_out(modules, lambda name: torch.float32)
        for index, module in enumerate(modules):
            for name, value in list(module.named_parameters()):
                setattr(module, name, store.put(f"blocks.{index}.{name}", lambda value=value: value.data))
        models.append(ring.add(store, modules, tail))
    for _ in range(4):
        model = chance.choice(models)
        for block, back, turns in visits(chance, tail, blocks):
            model.visit(block, back=back, turns=turns)
            if block not in model.store.resident:
                (held,) = {
                    module.__dict__["weight"].untyped_storage().data_ptr()
                    for module, _, _ in model._places[block]
                }
                streams.compute(held, model.store.bytes_of(block).data_ptr())
    return streams.run()


def test_a_thousand_random_schedules_read_no_block_before_it_is_there_nor_after_it_is_gone():
    assert sum(play(seed) for seed in range(1000)) == 0


@pytest.mark.parametrize("event", ["ready", "free"])
def test_without_either_event_those_schedules_would(event):
    def deaf(streams):
        if event == "ready":
            streams.wait = lambda event: None
        else:
            begin = streams.start
            streams.start = lambda slot, source, after: begin(slot, source, None)

    assert sum(play(seed, deaf) for seed in range(100)) > 50


def test_the_device_holds_no_more_than_the_slots_and_what_stays(paths):
    """Counted by an allocator that knows every tensor the ring makes."""
    made = []

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.uint8:
                storage = out.untyped_storage()
                made.append((storage.data_ptr(), storage.nbytes()))
            return out

    for stay, slots in itertools.product(((), (3, 4, 5)), (2, 3)):
        store = BlockStore(CPU, resident=stay)
        dit = load_dit(paths[0], store=store)
        adapter = adapted(dit)
        made.clear()
        with Counted():
            ring = BlockRing(CPU, slots)
            dit.streamed = ring.add(store, list(dit.blocks), dit.first_adapted)
            for _ in range(2):
                step(dit, adapter)
        host = store.memory.flat.data_ptr()
        block = store.bytes_of(0).nbytes
        found = {place: size for place, size in made if place != host}
        stays = {store.bytes_of(i).data_ptr() for i in stay}
        assert stays <= found.keys() and sum(found.values()) == (slots + len(stay)) * block


def test_a_ring_of_one_slot_is_refused():
    with pytest.raises(ValueError, match="a ring needs 2"):
        BlockRing(CPU, 1)


# ------------------------------------------------------------------------------------------ on a card


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_on_a_card_too_whoever_comes_next_and_however_late_the_copies_are(paths, checkpointing, late):
    device = torch.device("cuda")
    ring = BlockRing(device)
    models = [streamed(ring, path, (1,), checkpointing) for path in paths]
    truths = [resident(path, checkpointing, device) for path in paths]
    for turn, side in enumerate((0, 0, 1, 0, 1, 1)):
        if late:
            with torch.cuda.stream(ring.copies._stream):
                torch.cuda._sleep(20_000_000)
        (out, gradients), (other, expected) = (step(*all_[side], seed=turn) for all_ in (models, truths))
        torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-6)
        for name, value in expected.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6)
    assert (ring.copies.stall() > 0) or not late
    ring.close()


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_told_and_leaves_no_error_behind(caplog):
    flat = torch.zeros(1 << 20, dtype=torch.uint8)
    torch.ones(1, device="cuda")
    assert pin(flat)
    assert not pin(flat)  # a second time is an error of CUDA
    assert "could not be pinned" in caplog.text
    assert torch.ones(4, device="cuda").sum().item() == 4
