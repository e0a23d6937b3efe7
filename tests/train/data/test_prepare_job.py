"""What a long `prepare` must stand: small cards, damaged videos, many ranks, large files."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from wanmoe.moe_lora import motion
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import SURGICAL, ExpertSet
from wanmoe.moe_lora.video import write_video
from wanmoe.moe_lora.wan.codec import HaarCodec
from wanmoe.moe_lora.wan.text import HashTextEncoder
from wanmoe.train.data.clips import Clip
from wanmoe.train.data.plan import Piece
from wanmoe.train.data.prepare import Ranks, prepare
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.data.spool import Spool


def video(path: Path, frames: int, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, 4, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 48), mode="bilinear")
    write_video(path, (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), 16)
    return path


def clip(path: Path, **known: Any) -> Clip:
    return Clip(path, "the hook", path.stem, path.stem, f"clips.jsonl:{path.stem}", split="train", **known)


def run(clips: list[Clip], out: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"codec": HaarCodec(), "text_encoder": HashTextEncoder(dim=16), **options}
    return prepare(
        clips,
        out,
        experts=ExpertSet(SURGICAL),
        size=(32, 48),
        frames=9,
        **{"progress": False, "val_fraction": 0.0, **given},
    )


def test_the_text_encoder_is_gone_before_the_first_video_is_encoded(tmp_path: Path) -> None:
    made: list[weakref.ref[object]] = []
    events: list[str] = []

    class Text(HashTextEncoder):
        def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
            events.append("text")
            assert made[0]() is None, "the codec was only described"
            return super().__call__(ids, mask)

    class Codec(HaarCodec):
        def encode(self, video: Tensor) -> Tensor:
            events.append("video")
            assert [one() is None for one in made] == [True, True, False]
            return super().encode(video)

    def load(kind: type, **sizes: int) -> Any:
        model = kind(**sizes)
        made.append(weakref.ref(model))
        return model

    given = {"codec": lambda: load(Codec), "text_encoder": lambda: load(Text, dim=16)}
    clips = [clip(video(tmp_path / "v.mp4", 20))]
    run(clips, tmp_path / "s", **given)
    assert events == ["text", "text", "video", "video"]
    run(clips, tmp_path / "same")
    for path in (tmp_path / "s").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes(), path.name


def test_a_video_that_is_damaged_in_the_middle_ends_there(tmp_path: Path) -> None:
    path = video(tmp_path / "bad.mp4", 60)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    start, size = packets[30]
    assert start is not None
    data[start : start + size] = b"\xff" * size
    path.write_bytes(data)
    manifest = run([clip(path), clip(video(tmp_path / "good.mp4", 20, seed=1))], tmp_path / "s")
    ((reason, count),) = manifest["dropped"].items()
    assert reason.startswith("bad.mp4: the video is damaged at frame ") and str(tmp_path) not in reason
    found = ShardDataset(tmp_path / "s")
    sources = [found[index].meta["source"] for index in range(len(found))]
    assert sources.count("good") == 2 and sources.count("bad") == 6 - count >= 2


class FirstOfTwo(Ranks):
    """The first of two ranks, where the other's share of the samples never comes."""

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[: len(items) // 2] if isinstance(items[0], Piece) else items

    def together(self, action: Callable[[], Any]) -> Any:
        return action()

    def gather(self, items: list[Any]) -> list[Any]:
        return items


def test_the_bar_counts_the_samples_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, shown = tmp_path / "s", list[float]()
    update = tqdm.update

    class Codec(HaarCodec):
        def encode(self, video: Tensor) -> Tensor:
            Spool(out).put(f"other_{len(shown)}", {}, {})
            return super().encode(video)

    monkeypatch.setattr("wanmoe.train.data.prepare._COUNT_EVERY", 0.0)
    monkeypatch.setattr("wanmoe.train.data.prepare.agree", lambda values: None)
    monkeypatch.setattr(tqdm, "update", lambda bar, n=1: (update(bar, n), shown.append(bar.n)))
    clips = [clip(video(tmp_path / "v.mp4", 36))]
    with pytest.raises(WanmoeError, match="v_v-w002_.*cannot be read"):
        run(clips, out, codec=Codec(), ranks=FirstOfTwo(0, 2), progress=True)
    assert shown[:2] == [2, 4]


def test_a_large_video_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("wanmoe.moe_lora.files.REMEMBERED_BYTES", 1)
    path = video(tmp_path / "v.mp4", 9)
    run([clip(path)], tmp_path / "s")
    monkeypatch.setattr("wanmoe.moe_lora.files.file_sha256", lambda path: pytest.fail("hashed again"))
    run([clip(path)], tmp_path / "t")


@pytest.mark.parametrize(
    ("variable", "ranks", "threads"),
    [("LOCAL_WORLD_SIZE", 4, 2), ("LOCAL_SIZE", 2, 4), ("LOCAL_SIZE", 9, 1)],
)
def test_ranks_of_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, variable: str, ranks: int, threads: int
) -> None:
    used: list[int] = []
    pool = motion.ThreadPoolExecutor
    monkeypatch.setattr(motion, "ThreadPoolExecutor", lambda count: (used.append(count), pool(count))[1])
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, str(ranks))
    motion.clip_flow(torch.zeros(2, 32, 48, 3, dtype=torch.uint8))
    assert used == [threads]


def test_what_is_complete_is_left_and_what_is_damaged_or_other_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded: list[int] = []

    class Counting(HaarCodec):
        def encode(self, video: Tensor) -> Tensor:
            encoded.append(len(video))
            return super().encode(video)

    clips = [clip(video(tmp_path / f"{name}.mp4", 9, seed)) for seed, name in enumerate("ab")]
    out = tmp_path / "s"
    first = run(clips, out, codec=Counting())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = run(clips, out, codec=Counting(), progress=True)
    assert again == {**first, "checksum": again["checksum"]} and len(encoded) == 2
    assert "complete already" in capsys.readouterr().err
    shard = next(out.glob("train-*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    run(clips, out, codec=Counting())
    assert len(encoded) == 4 and {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(clips[:1], out, codec=Counting(), progress=True)
    assert "shards of other clips or settings" in capsys.readouterr().err and len(ShardDataset(out)) == 1
