"""Router prompts in files: a list of one's own, and the pooled texts beside the shards, in all that is done
with a folder of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import CHOLEC, SURGICAL, ExpertSet
from wanmoe.moe_lora.video import write_video
from wanmoe.moe_lora.wan.codec import load_vae
from wanmoe.moe_lora.wan.text import HashTextEncoder, encode_prompts
from wanmoe.train.data import spool
from wanmoe.train.data.clip_list import clips_from_folder
from wanmoe.train.data.prepare import prepare
from wanmoe.train.data.repair import repair
from wanmoe.train.data.router_prompts import RouterPrompt
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import ShardDataset, ShardError
from wanmoe.train.data.stats import shard_stats
from wanmoe.train.data.stored_prompts import (
    ROUTER_PROMPTS,
    PromptSampler,
    pack_prompts,
    read_prompt_list,
    unpack_prompts,
)
from wanmoe.train.data.verify import verify_shards

EXPERTS = ExpertSet(SURGICAL)
PROMPTS = [
    RouterPrompt("剪刀", {"Scissors": 1.0}),
    RouterPrompt("a hook and a grasper", {"Hook/Electrocautery": 0.5, "Other": 0.5}),
    *(RouterPrompt(f"suction {number}", {"Suction": 1.0}) for number in range(70)),
]
CODEC = {"name": "test", "fingerprint": "c0", "stand_in": True}


def write(root: Path, pooled: torch.Tensor, prompts: list[RouterPrompt] = PROMPTS) -> Path:
    with ShardWriter(root, CODEC, CODEC) as writer:
        writer.set_router_prompts(pooled, prompts)
        meta = {"caption": "x", "instruments": [], "source": "s", "fps": 16, "n_frames": 5}
        writer.add("v_0", "train", torch.zeros(16, 2, 3, 4), torch.ones(2, 8), meta)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "s", torch.arange(len(PROMPTS) * 8).view(-1, 8).half())


def test_what_is_written_is_read_verified_and_counted(root: Path) -> None:
    data = ShardDataset(root)
    found = data.router_prompts()
    assert found is not None and found.texts == tuple(prompt.text for prompt in PROMPTS)
    assert found.weights[1] == (("Hook/Electrocautery", 0.5), ("Other", 0.5))
    assert torch.equal(found.pooled, torch.arange(len(PROMPTS) * 8).view(-1, 8).half())
    assert data.manifest["router_prompts"]["n"] == 72
    assert verify_shards(root).ok and not repair(root).needed
    assert shard_stats(root).samples == {"train": 1}


def test_the_same_prompts_are_the_same_bytes(tmp_path: Path) -> None:
    pooled = torch.randn(len(PROMPTS), 8).bfloat16()
    files = [(write(tmp_path / name, pooled) / ROUTER_PROMPTS).read_bytes() for name in "ab"]
    assert files[0] == files[1] == pack_prompts(pooled, PROMPTS)
    # A folder with prompts is replaced by one without.
    write(tmp_path / "a", torch.zeros(0, 8).half(), [])
    assert ShardDataset(tmp_path / "a").router_prompts() is None
    assert not (tmp_path / "a" / ROUTER_PROMPTS).exists()


def test_a_flipped_byte_is_named_and_repair_goes_on_without_the_prompts(root: Path) -> None:
    path = root / ROUTER_PROMPTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="router_prompts.safetensors: altered or cut short"):
        ShardDataset(root).router_prompts()
    (problem,) = verify_shards(root).problems
    assert "router_prompts" in problem and "wanmoe data repair" in problem
    report = repair(root, apply=True)
    assert report.quarantine is not None and (report.quarantine / ROUTER_PROMPTS).read_bytes() == data
    assert any("the router prompts are lost" in note for note in report.notes)
    assert ShardDataset(root).router_prompts() is None and verify_shards(root).ok
    assert report.kept == {"train": 1}


def test_sound_prompts_survive_the_repair_of_a_shard(root: Path) -> None:
    whole = (root / ROUTER_PROMPTS).read_bytes()
    (root / "stray.tar").write_bytes(b"")
    report = repair(root, apply=True)
    assert report.dropped == ["stray.tar"] and (root / ROUTER_PROMPTS).read_bytes() == whole
    assert verify_shards(root).ok and ShardDataset(root).router_prompts() is not None
    assert report.quarantine is not None and not (report.quarantine / ROUTER_PROMPTS).exists()


def test_prompts_that_no_manifest_names_are_set_aside(root: Path) -> None:
    (root / "manifest.json").unlink()
    report = repair(root, apply=True)
    assert any("the manifest does not name it" in note for note in report.notes)
    assert verify_shards(root).ok and ShardDataset(root).router_prompts() is None


def test_a_missing_file_is_named(root: Path) -> None:
    (root / ROUTER_PROMPTS).unlink()
    with pytest.raises(ShardError, match="cannot be read"):
        ShardDataset(root).router_prompts()
    assert len(verify_shards(root).problems) == 1


@pytest.mark.parametrize(
    ("pooled", "reason"),
    [
        (torch.zeros(72, 8), "pooled is float32"),
        (torch.zeros(71, 8).half(), r"\[71, 8\], expected finite"),
        (torch.full((72, 8), torch.inf).half(), "expected finite"),
        (torch.zeros(72, 9).half(), "texts are 9 wide, those of the samples 8"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, pooled: torch.Tensor, reason: str) -> None:
    with pytest.raises(ShardError, match=reason):
        write(tmp_path / "s", pooled)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pooled": torch.zeros(2, 8)}, r"pooled is \[2, 8\], expected \[72, 8\]"),
        ({"pooled": torch.full((72, 8), torch.nan)}, "no finite numbers"),
        ({"prompts": torch.zeros(3, dtype=torch.uint8)}, "not a file of router prompts: JSON"),
        ({"prompts": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "not a file of router prompts: Type"),
        ({"pooled": None}, "not a file of router prompts: KeyError"),
    ],
)
def test_a_file_of_something_else_is_named(change: dict[str, Any], reason: str) -> None:
    tensors = load(pack_prompts(torch.zeros(72, 8).half(), PROMPTS)) | change
    data = save({name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(ValueError, match=reason):
        unpack_prompts(data, 8)
    with pytest.raises(ValueError, match="not a file of router prompts: Safetensor"):
        unpack_prompts(data[:-5], 8)


def test_a_list_of_ones_own_gives_names_or_weights(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "cut", "instruments": ["Scissors"]}\n\n'
        '{"prompt": "切", "instruments": {"bipolar": 3, "Suction": 1}}\n'
        '{"prompt": "hold", "instruments": ["Other", "scissors"]}\n'
    )
    assert read_prompt_list(path, EXPERTS) == [
        ("cut", {"Scissors": 1.0}),
        ("切", {"Hook/Electrocautery": 0.75, "Suction": 0.25}),
        ("hold", {"Other": 0.5, "Scissors": 0.5}),
    ]
    tools = read_prompt_list(path, ExpertSet(CHOLEC))
    assert tools[2].weights == {"grasper": 0.25, "clipper": 0.25, "scissors": 0.5}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ('["a"]', "expected an object with prompt and instruments"),
        ('{"prompt": "a", "instruments": ["Other"], "x": 1}', "expected an object with prompt"),
        ('{"prompt": " ", "instruments": ["Other"]}', "prompt is a text"),
        ('{"prompt": "a", "instruments": []}', "a weight above zero"),
        ('{"prompt": "a", "instruments": {"Other": -1}}', "names, or weights by name"),
        ('{"prompt": "a", "instruments": {"Other": true}}', "names, or weights by name"),
        ('{"prompt": "a", "instruments": {"Other": NaN}}', "names, or weights by name"),
        ('{"prompt": "a", "instruments": "Other"}', "names, or weights by name"),
        ('{"prompt": "a", "instruments": ["Scisors"]}', "unknown expert 'Scisors'; nearest is 'Scissors'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "instruments": ["Other"]}\n' + line + "\n")
    with pytest.raises(WanmoeError, match=reason) as caught:
        read_prompt_list(path, EXPERTS)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)
    for content, cause in ((b"", "holds no router prompt"), (b"\xff", "not a text file in UTF-8")):
        path.write_bytes(content)
        with pytest.raises(WanmoeError, match=cause):
            read_prompt_list(path, EXPERTS)


def test_a_sampler_draws_by_its_generator_and_moves_by_its_noise() -> None:
    pooled, taught = torch.randn(50, 300, generator=torch.manual_seed(0)), torch.eye(50)
    still = PromptSampler(pooled, taught, noise=0.0)
    texts, wanted = still(64, torch.Generator().manual_seed(1))
    assert torch.allclose(texts, torch.nn.functional.layer_norm(pooled, (300,))[wanted.argmax(1)])
    one, two = (PromptSampler(pooled, taught)(64, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and torch.equal(one[1], wanted)
    moved = (one[0] - texts).std(1)
    assert 0 <= moved.min() < 0.3 and 1.5 < moved.max() < 2.5
    # A direction that all prompts share is not moved.
    constant = PromptSampler(torch.cat([pooled, torch.full((50, 1), 100.0)], 1) * 0 + 1.0, taught)
    assert torch.isfinite(constant(4)[0]).all()


class Counting(HashTextEncoder):
    """Counts the prompts that it encodes; fails, if asked to, after so many."""

    def __init__(self, lasts: int = 1000) -> None:
        super().__init__(16)
        self.lasts, self.seen = lasts, list[str]()

    def tokenize(self, prompts: Any) -> Any:
        if len(self.seen) >= self.lasts:
            raise WanmoeError("the encoder broke")
        self.seen += prompts
        return super().tokenize(prompts)


def test_prepare_pools_each_prompt_and_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write_video(tmp_path / "c" / "hook.mp4", torch.zeros(9, 32, 32, 3, dtype=torch.uint8), 16)
    options: dict[str, Any] = {"codec": load_vae("haar"), "experts": EXPERTS, "size": (32, 32), "frames": 9}
    options |= {"progress": False, "val_fraction": 0.0}
    clips = clips_from_folder(tmp_path / "c")

    def run(name: str, encoder: Counting, prompts: list[RouterPrompt] = PROMPTS) -> Path:
        prepare(clips, tmp_path / name, text_encoder=encoder, router_prompts=prompts, **options)
        return tmp_path / name

    whole = run("whole", Counting())
    found = ShardDataset(whole).router_prompts()
    assert found is not None and found.pooled.shape == (72, 16) and verify_shards(whole).ok
    for row, text in zip(found.pooled, found.texts, strict=True):
        (context,) = encode_prompts(HashTextEncoder(16), [text])
        assert torch.equal(row, context.mean(0).half())
    with pytest.raises(WanmoeError, match="the encoder broke"):
        run("s", Counting(lasts=40))  # two captions and two groups of 32 prompts
    assert len(list(spool.Spool(tmp_path / "s").folder.glob("prompts-*"))) == 2
    again = Counting()
    run("s", again)
    assert again.seen == [prompt.text for prompt in PROMPTS[64:]]
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()
    }
    nothing = Counting()
    run("s", nothing)
    assert nothing.seen == []
    fewer = ShardDataset(run("s", Counting(), PROMPTS[:3])).router_prompts()
    assert fewer is not None and len(fewer.texts) == 3
