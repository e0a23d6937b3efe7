"""Folders of shards behind a URL: the samples are those of a disk, read by ranges; faults are an OSError."""

import sys
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.train.data import store
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import Sample, ShardDataset, ShardError
from wanmoe.train.data.store import LocalStore, RemoteStore, open_store
from wanmoe.train.data.stream import ShardStream

CODEC = {"name": "test", "fingerprint": "c0", "stand_in": True}
TEXT = {"name": "test", "fingerprint": "t0", "stand_in": True}
SIZE = (1, 3, 5)


class Ranges(SimpleHTTPRequestHandler):
    """Serves byte ranges, as object stores do."""

    broken: ClassVar[dict[str, int]] = {}
    """The status that every request of a file gets, by its name."""
    served: ClassVar[list[tuple[str, str]]] = []
    """Name and range of each file that was read."""
    hiccups: ClassVar[dict[str, list[int]]] = {}
    """What the next requests of a file get, by its name: a status, or 0 for an answer that breaks off."""
    silent: ClassVar[set[str]] = set()
    """Files of which the server says nothing until the test ends."""
    over: ClassVar[threading.Event] = threading.Event()

    def do_HEAD(self) -> None:
        if not self.hiccup(Path(self.path).name):
            super().do_HEAD()

    def hiccup(self, name: str) -> bool:
        if not self.hiccups.get(name):
            return False
        if status := self.hiccups[name].pop(0):
            self.send_error(status)
        else:
            self.send_response(206)
            self.send_header("Content-Length", "1000")
            self.end_headers()
        self.close_connection = True
        return True

    def do_GET(self) -> None:
        name = Path(self.path).name
        if self.hiccup(name):
            return None
        if name in self.silent:
            self.over.wait(30)
            return None
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if name in self.broken:
            return self.send_error(self.broken[name])
        if wanted is None or not path.is_file():
            return super().do_GET()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        data = path.read_bytes()
        if int(first) >= len(data):
            return self.send_error(416)
        piece = data[int(first) : int(last) + 1 if last else None]
        self.served.append((name, wanted))
        self.send_response(206)
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(piece)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    with ShardWriter(tmp_path / "shards", CODEC, TEXT) as writer:
        for number in range(7):
            writer.max_bytes = 0 if number % 3 == 2 else 2**30
            meta = {"caption": f"剪刀 {number}", "instruments": []}
            writer.add(f"k{number}", "train", torch.randn(16, *SIZE), torch.randn(2, 8), meta)
    return tmp_path / "shards"


def serve(folder: Path, kind: type[SimpleHTTPRequestHandler]) -> Iterator[str]:
    def handler(*request: Any) -> SimpleHTTPRequestHandler:
        return kind(*request, directory=str(folder.parent))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{folder.name}"
        Ranges.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def http(folder: Path) -> Iterator[str]:
    for state in (Ranges.broken, Ranges.served, Ranges.hiccups, Ranges.silent):
        state.clear()
    Ranges.over.clear()
    yield from serve(folder, Ranges)


@pytest.fixture(autouse=True)
def paused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each pause before a new try would have been."""
    pauses: list[float] = []
    monkeypatch.setattr(RemoteStore, "pause", staticmethod(pauses.append))
    return pauses


@pytest.fixture
def http_without_ranges(folder: Path) -> Iterator[str]:
    class Silent(SimpleHTTPRequestHandler):
        log_message = Ranges.log_message

    yield from serve(folder, Silent)


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """What stands in for `s3://`."""
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/bucket/shards", recursive=True)
    yield "memory://bucket/shards"
    system.rm("/bucket", recursive=True)


@pytest.fixture(params=["http", "memory", "file"])
def url(request: pytest.FixtureRequest, folder: Path) -> str:
    return folder.as_uri() if request.param == "file" else str(request.getfixturevalue(request.param))


def same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


def test_both_readers_give_the_same_from_a_url_as_from_a_disk(folder: Path, url: str) -> None:
    local, remote = ShardDataset(folder), ShardDataset(url)
    assert len(remote) == 7 and all(same(remote[n], local[n]) for n in range(7))
    streams = [islice(ShardStream(root, seed=0).samples(SIZE, 1, 2), 12) for root in (folder, url + "/")]
    for one, other in zip(*streams, strict=True):
        assert isinstance(one, Sample) and isinstance(other, Sample) and same(one, other)


def test_a_stream_asks_for_a_shard_at_a_time(http: str) -> None:
    stream = ShardStream(http, seed=0)
    Ranges.served.clear()
    assert len(list(islice(stream.samples(SIZE, 0, 1), 7))) == 7
    assert sorted(name for name, _ in Ranges.served if name.startswith("train")) == [
        f"train-1x3x5-{number:06d}.tar" for number in range(3)
    ]


def test_a_store_reads_pieces(folder: Path, url: str) -> None:
    name = "train-1x3x5-000000.tar"
    data = (folder / name).read_bytes()
    for opened in (open_store(folder), open_store(url)):
        assert opened.size(name) == len(data) and opened.read(name) == data
        assert opened.read(name, 100, 50) == data[100:150] and opened.read(name, 100) == data[100:]
        assert opened.read(name, len(data) - 5, 10) == data[-5:]
        assert opened.read(name, len(data), 10) == opened.read(name, 0, 0) == b""
        assert opened.path(name).endswith(f"/shards/{name}")
        for outside in ("../secret", "/etc/passwd", "a/b", "..", "", "a\\b", "pipe:touch /x"):
            with pytest.raises(OSError, match="no name of a file in this folder"):
                opened.read(outside)
            with pytest.raises(OSError):
                opened.size(outside)
        for act in (opened.read, opened.size):
            with pytest.raises(OSError):
                act("missing.tar")


def test_a_read_reserves_no_more_than_there_is(folder: Path) -> None:
    tracemalloc.start()
    data = LocalStore(folder).read("train-1x3x5-000000.tar", 0, 2**40)
    assert tracemalloc.get_traced_memory()[1] < len(data) + 2**20
    tracemalloc.stop()


def test_a_shard_that_is_cut_or_missing_behind_a_url_is_named(folder: Path, url: str) -> None:
    if url.startswith("memory"):
        system = fsspec.filesystem("memory")
        system.pipe(
            "/bucket/shards/train-1x3x5-000000.tar", (folder / "train-1x3x5-000000.tar").read_bytes()[:3000]
        )
        system.rm("/bucket/shards/train-1x3x5-000001.tar")
    else:
        shard = folder / "train-1x3x5-000000.tar"
        shard.write_bytes(shard.read_bytes()[:3000])
        (folder / "train-1x3x5-000001.tar").unlink()
    found = list(islice(ShardStream(url, seed=0).samples(SIZE, 0, 1), 7))
    errors = {one.key: one.reason for one in found if isinstance(one, ShardError)}
    assert sorted(errors) == ["k1", "k2", "k3", "k4", "k5"] and "cut short" in errors["k2"]
    assert "cannot be read" in errors["k4"]
    with pytest.raises(ShardError, match="cut short: 3000 bytes"):
        ShardDataset(url)


@pytest.mark.parametrize("status", [403, 500, 503])
def test_an_answer_of_the_server_that_is_no_data_is_an_error_of_the_sample(
    http: str, status: int, paused: list[float]
) -> None:
    stream, by_offset = ShardStream(http, seed=0), ShardDataset(http)
    Ranges.broken["train-1x3x5-000002.tar"] = status
    found = list(islice(stream.samples(SIZE, 0, 1), 7))
    (error,) = [one for one in found if isinstance(one, ShardError)]
    assert error.key == "k6" and str(status) in str(error) and "\n" not in str(error)
    paused.clear()
    with pytest.raises(ShardError, match=str(status)):
        by_offset[6]
    assert paused == ([] if status == 403 else [0.5, 2.0, 8.0])
    Ranges.broken["manifest.json"] = status
    with pytest.raises(ShardError, match=str(status)):
        ShardStream(http, seed=0)


def test_a_server_that_is_gone_is_one_line(http: str, folder: Path) -> None:
    address = http.replace(http.split(":")[2].split("/")[0], "9")
    with pytest.raises(ShardError, match="manifest.json: cannot be read") as caught:
        ShardStream(address, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hiccups", [[503], [0], [429, 0, 500]])
def test_a_hiccup_of_the_server_costs_a_pause_and_no_sample(
    folder: Path, http: str, paused: list[float], caplog: pytest.LogCaptureFixture, hiccups: list[int]
) -> None:
    name = "train-1x3x5-000000.tar"
    by_offset, stream = ShardDataset(http), ShardStream(http, seed=0)
    for read in (lambda: [by_offset[0]], lambda: list(islice(stream.samples(SIZE, 0, 1), 7))):
        Ranges.hiccups[name] = list(hiccups)
        caplog.clear()
        paused.clear()
        assert all(isinstance(one, Sample) for one in read())
        assert paused == [0.5, 2.0, 8.0][: len(hiccups)] and len(caplog.messages) == len(hiccups)
        assert all(f"/{name}: " in line and "try again" in line for line in caplog.messages)


def test_a_hiccup_costs_no_size_of_a_file(folder: Path, http: str, paused: list[float]) -> None:
    name, remote = "train-1x3x5-000000.tar", RemoteStore(http)
    Ranges.hiccups[name] = [503] * 6  # each try asks by HEAD, then by GET
    assert remote.size(name) == (folder / name).stat().st_size and paused == [0.5, 2.0, 8.0]
    Ranges.hiccups[name] = [503] * 8
    with pytest.raises(OSError, match="503"):
        remote.size(name)


def test_what_a_new_try_cannot_mend_is_not_tried_again(http: str, paused: list[float]) -> None:
    remote = RemoteStore(http)
    for name, status in (("gone.tar", 404), ("secret.tar", 403), ("private.tar", 401)):
        Ranges.hiccups[name] = [status] * 2
        for act in (remote.read, remote.size):
            with pytest.raises(OSError, match=name if status == 404 else str(status)):
                act(name)
            Ranges.hiccups[name] = [status] * 2
    with pytest.raises(OSError, match="no name of a file"):
        remote.read("../secret")
    assert paused == []


@pytest.mark.parametrize("limit", ["sock_read", "total"])
def test_a_server_that_falls_silent_is_an_error_in_time(
    http: str, limit: str, paused: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(store.TIME_LIMITS, limit, 0.05)
    Ranges.silent.add("index.jsonl")
    remote = RemoteStore(http)
    with pytest.raises(OSError, match="[Tt]ime"):
        remote.read("index.jsonl")
    assert paused == [0.5, 2.0, 8.0]


def test_a_server_without_byte_ranges_is_named(http_without_ranges: str) -> None:
    stream = ShardStream(http_without_ranges, seed=0, shuffle=1)
    found = list(islice(stream.samples(SIZE, 1, 4), 2))
    assert all("does not serve byte ranges" in str(one) for one in found if isinstance(one, ShardError))
    with pytest.raises(ShardError, match="does not serve byte ranges"):
        ShardDataset(http_without_ranges)[0]


def test_a_server_that_hides_the_size_of_a_file_is_named(http: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ShardDataset(http)
    monkeypatch.setattr(data.store._system, "size", lambda _: None)
    with pytest.raises(ShardError, match="does not say how large"):
        data.check_shards()


def test_a_reader_process_makes_a_connection_of_its_own(folder: Path, http: str) -> None:
    data = ShardDataset(http)
    assert same(data[0], ShardDataset(folder)[0])  # the parent is connected before the fork
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [sample.key for sample in loader] == data.keys


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/shards", "pip install s3fs"),
        ("gs://bucket/shards", "pip install gcsfs"),
        ("nowhere://bucket/shards", "Protocol not known: nowhere"),
    ],
)
def test_a_url_that_nothing_opens_is_one_line(monkeypatch: pytest.MonkeyPatch, url: str, reason: str) -> None:
    for package in ("s3fs", "gcsfs"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WanmoeError, match=reason) as caught:
        RemoteStore(url)
    assert "\n" not in str(caught.value) and url in str(caught.value)


@pytest.mark.parametrize("mark", ["?token=very-secret", "#very-secret"])
def test_a_url_with_a_query_is_one_line_without_what_it_holds(mark: str) -> None:
    with pytest.raises(WanmoeError, match="https://host/shards: a root takes no query") as caught:
        open_store(f"https://host/shards{mark}")
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_errors_of_the_library_for_s3_are_os_errors(
    memory: str, monkeypatch: pytest.MonkeyPatch, paused: list[float]
) -> None:
    class BotoCoreError(Exception):  # as in botocore.exceptions, which s3fs lets through without credentials
        pass

    def cat_file(*_: Any, **__: Any) -> bytes:
        raise BotoCoreError("Unable to locate credentials")

    remote = RemoteStore(memory)
    monkeypatch.setitem(
        sys.modules, "botocore.exceptions", type("module", (), {"BotoCoreError": BotoCoreError})
    )
    monkeypatch.setattr(remote._system, "cat_file", cat_file)
    with pytest.raises(OSError, match="BotoCoreError: Unable to locate credentials"):
        remote.read("manifest.json")
    assert paused == []  # that library makes its own tries
