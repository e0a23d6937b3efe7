"""Whole or not at all, and the sums that `sha256sum` prints."""

import hashlib
import os
import stat

import pytest

from wanmoe.moe_lora import files
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.files import file_sha256, write_atomic
from wanmoe.moe_lora.wan.codec import file_digest


def test_a_file_is_flushed_before_it_takes_its_place(tmp_path, monkeypatch):
    target, seen = tmp_path / "a.txt", []
    target.write_text("old")
    real = os.fsync

    def fsync(handle):
        seen.append((os.fstat(handle).st_size, target.read_text()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(target, lambda path: path.write_text("new text"))
    assert seen == [(8, "old")] and target.read_text() == "new text"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_atomic(tmp_path / "ours", lambda path: path.write_text("x"))
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


class CodecError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "cause"),
    [(OSError(28, "No space left on device"), "No space left"), (CodecError("bad"), "bad")],
)
def test_a_failed_write_is_one_line_and_keeps_the_old_file(tmp_path, error, cause):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write(path):
        path.write_text("half")
        raise error

    with pytest.raises(WanmoeError) as caught:
        write_atomic(target, write, (CodecError,))
    assert str(target) in str(caught.value) and cause in str(caught.value)
    assert "nothing was replaced" in str(caught.value)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_fault_of_the_program_is_not_taken_for_a_full_disk(tmp_path):
    def write(path):
        path.write_text("half")
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        write_atomic(tmp_path / "a.txt", write)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(WanmoeError, match=r"a.txt: could not be written \(No such file or directory\)"):
        write_atomic(tmp_path / "nowhere" / "a.txt", lambda path: path.write_text("x"))


def test_sums_of_one_file_and_of_several(tmp_path):
    data = {"a": os.urandom((1 << 22) + 5), "b": b""}
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / "a", tmp_path / "b"]
    assert [file_sha256(file) for file in files] == [hashlib.sha256(c).hexdigest() for c in data.values()]
    assert file_digest(files[:1]) == file_sha256(str(files[0]))
    assert file_digest(files) == hashlib.sha256(b"a\0" + data["a"] + b"b\0").hexdigest()


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "REMEMBERED_BYTES", 4)
    hashed = []
    real = files.file_sha256
    monkeypatch.setattr(files, "file_sha256", lambda path: hashed.append(path) or real(path))
    path = tmp_path / "model"
    path.write_bytes(b"weights")
    digest = files.remembered_sha256(path)
    assert digest == real(path)
    assert files.remembered_sha256(path) == digest and len(hashed) == 1
    os.utime(path, ns=(1, 1))
    assert files.remembered_sha256(path) == digest and len(hashed) == 2
    path.write_bytes(b"WEIGHTS")
    assert files.remembered_sha256(path) == real(path) != digest
    for record in (tmp_path / "cache" / "wanmoe" / "sha256").iterdir():
        record.write_text("{")
    assert files.remembered_sha256(path) == real(path)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "REMEMBERED_BYTES", 0)
    path = tmp_path / "model"
    path.write_bytes(b"weights")
    with caplog.at_level("INFO", logger="wanmoe"):
        assert files.remembered_sha256(path) == files.file_sha256(path)
    assert "is not remembered" in caplog.text
