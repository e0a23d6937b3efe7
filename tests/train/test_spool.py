"""What waits to be sent outlives crashes at any place, and is neither lost nor doubled."""

import errno
import fcntl
import json
import os
import shutil
import threading

import pytest

from wanmoe.moe_lora import WanmoeError
from wanmoe.train import spool as spool_file
from wanmoe.train.spool import Spool


def log(spool: Spool, *steps: int) -> None:
    for step in steps:
        spool.append({"op": "metrics", "run": "r", "step": step})


def waiting(spool: Spool) -> list[int]:
    return [op["step"] for op in spool.peek(1000)]


def test_a_lock_of_another_machine_is_waited_for(tmp_path, monkeypatch, capsys):
    """That machine may be gone, and a server of files still keep its lock."""
    (asked, go), (gone, told) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # has the lock until it is told to go
        monkeypatch.setattr(spool_file.socket, "gethostname", lambda: "node-b")
        held = spool_file.FolderLock(tmp_path, "")
        os.write(told, b"x")
        os.read(asked, 1)
        held.close()
        os.write(told, b"x")
        os._exit(0)
    os.read(gone, 1)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            os.write(go, b"x")
            os.read(gone, 1)

    with monkeypatch.context() as patch:
        patch.setattr(spool_file.time, "sleep", sleep)
        patch.setattr(spool_file.time, "monotonic", lambda: sum(slept))
        patch.setattr(spool_file, "LEASE", 1.5)
        with pytest.raises(WanmoeError, match=f"process {child} on node-b is at work there"):
            spool_file.FolderLock(tmp_path, "is at work there")
        assert len(slept) == 2
        patch.setattr(spool_file, "LEASE", 120.0)
        spool_file.FolderLock(tmp_path, "is at work there").close()
    assert len(slept) == 3
    assert f"waiting for process {child} on node-b, 120 s at most" in capsys.readouterr().err
    os.waitpid(child, 0)
    for pipe in (asked, go, gone, told):
        os.close(pipe)


def test_operations_come_back_in_order_until_they_are_done(tmp_path):
    spool = Spool(tmp_path)
    log(spool, 1, 2, 3)
    assert (
        spool.waiting == 3 and waiting(spool) == [1, 2, 3] and [op["step"] for op in spool.peek(2)] == [1, 2]
    )
    spool.done(spool.peek(2))
    log(spool, 4)
    assert spool.waiting == 2 and waiting(spool) == [3, 4]
    spool.close()
    again = Spool(tmp_path)
    assert again.waiting == 2 and waiting(again) == [3, 4]
    log(again, 5)
    again.done(again.peek(9))
    assert again.waiting == 0 and waiting(again) == []
    again.close()
    assert (tmp_path / "spool.jsonl").read_text() == ""
    last = Spool(tmp_path)
    log(last, 6)
    # Numbers go on where all is sent: what comes next is never taken for what is done.
    assert last.peek(1)[0]["n"] == 6
    last.close()


def test_threads_append_whole_lines(tmp_path):
    spool = Spool(tmp_path)
    threads = [threading.Thread(target=log, args=(spool, *range(k, 400, 4))) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waiting(spool)) == list(range(400))
    assert [op["n"] for op in spool.peek(1000)] == list(range(1, 401))
    spool.close()


@pytest.mark.parametrize("cut", range(1, 12))
def test_lists_that_a_crash_cut_short_are_read_up_to_there(tmp_path, cut):
    spool = Spool(tmp_path)
    log(spool, 1, 2, 3)
    spool.done(spool.peek(1))
    spool.done(spool.peek(1))
    spool.close()
    spooled, sent = tmp_path / "spool.jsonl", tmp_path / "sent.jsonl"
    spooled.write_text(spooled.read_text() + '{"op": "metrics", "run": "r", "n": 4, "step": 4}\n'[:-cut])
    sent.write_text(sent.read_text() + '{"n": 3}\n'[: -min(cut, 9)])
    again = Spool(tmp_path)
    log(again, 5)
    assert waiting(again) == [3, 5]
    again.close()


def test_an_acknowledgement_that_was_lost_sends_again_and_loses_nothing(tmp_path):
    spool = Spool(tmp_path)
    log(spool, 1, 2)
    before = (tmp_path / "sent.jsonl").read_text()
    spool.done(spool.peek(2))
    (tmp_path / "sent.jsonl").write_text(before)
    spool.close()
    again = Spool(tmp_path)
    assert waiting(again) == [1, 2]
    again.close()


def test_a_line_that_is_damaged_is_set_aside(tmp_path):
    spool = Spool(tmp_path)
    log(spool, 1, 2)
    spool.close()
    spooled = tmp_path / "spool.jsonl"
    spooled.write_text(spooled.read_text().replace('"step": 1', '"step: 1') + "[]\n")
    again = Spool(tmp_path)
    assert waiting(again) == [2]
    reasons = [json.loads(line)["reason"] for line in again.refused.read_text().splitlines()]
    assert reasons == ["damaged on disk"] * 2
    # It is not sent as it is; what is of use to somebody stays.
    again.refuse({"op": "metrics", "run": "r", "step": 7}, "no room")
    damaged = again.refused.read_text().splitlines()[:2]
    with again.refused.open("a") as file:
        file.write("no JSON\n")
    for _ in range(2):
        again.retry_refused()
        assert waiting(again) == [2, 7]
        assert again.refused.read_text().splitlines() == [*damaged, '{"damaged": "no JSON"}']
    again.close()


def test_the_lists_of_a_long_run_do_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_file, "LONG", 2000)
    spool = Spool(tmp_path)
    spool.append({"op": "run", "run": "r", "name": "x"})
    spool.begun(spool.peek(1)[0], "id")
    spool.done(spool.peek(1))
    sizes, seen = [], []
    for step in range(300):
        log(spool, step)
        if step % 10 == 7:  # something waits for a while
            continue
        while spool.waiting:
            ops = spool.peek(1)
            seen += [op["step"] for op in ops]
            spool.done(ops)
        sizes.append(sum((tmp_path / name).stat().st_size for name in ("spool.jsonl", "sent.jsonl")))
    assert seen == list(range(300)) and max(sizes) < 2 * 2000 and spool.peek(1) == []
    assert [op["n"] for op in spool.peek(9)] == []
    log(spool, 300)
    # As after a kill: what is sent is known to be, and the run too.
    for name in ("spool.jsonl", "sent.jsonl"):
        (tmp_path / "copy" / "files").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / name, tmp_path / "copy")
    again = Spool(tmp_path / "copy")
    assert waiting(again) == [300] and again.peek(1)[0]["n"] == 302
    assert again.runs["r"]["id"] == "id" and again.current["name"] == "x" and not again.ended
    again.close()
    spool.close()


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    log(spool, 1)
    whole = spool._file

    class Full:
        def write(self, line):
            return whole.write(line[:5])

        def __getattr__(self, name):
            return getattr(whole, name)

    with monkeypatch.context() as patch:
        patch.setattr(spool, "_file", Full())
        with pytest.raises(
            WanmoeError, match=f"spool.jsonl: could not be written .{os.strerror(errno.ENOSPC)}"
        ):
            log(spool, 2)
    log(spool, 3)
    assert waiting(spool) == [1, 3] and spool.waiting == 2
    spool.close()


def test_files_are_kept_as_they_were_until_they_are_sent(tmp_path):
    spool = Spool(tmp_path / "spool")
    in_place, replaced = tmp_path / "config.toml", tmp_path / "adapter.safetensors"
    ops = []
    for path, whole in ((in_place, False), (replaced, True)):
        path.write_text("old")
        ops.append({"op": "artifact", "run": "r", "file": spool.keep(path, whole)})
        spool.append(ops[-1])
    assert (spool.folder / ops[1]["file"]).samefile(replaced)
    in_place.write_text("new")
    replaced.unlink()
    replaced.write_text("new")
    stray = spool.keep(in_place, False)
    spool.close()
    # A crash between the copy and the line that names it leaves a file that nobody needs.
    assert not (tmp_path / "spool" / stray).exists()
    again = Spool(tmp_path / "spool")
    assert [(again.folder / op["file"]).read_text() for op in again.peek(2)] == ["old", "old"]
    again.refuse(again.peek(1)[0], "no room")
    again.done(again.peek(2))
    assert len(list((again.folder / "files").iterdir())) == 1
    again.retry_refused()
    (op,) = again.peek(9)
    assert (again.folder / op["file"]).read_text() == "old" and op["key"] == "r-1" and op["n"] == 3
    again.done([op])
    assert list((again.folder / "files").iterdir()) == []
    again.close()


def test_the_latest_run_and_whether_it_ended_is_known_over_openings(tmp_path):
    spool = Spool(tmp_path)
    assert spool.current is None and spool.ended and spool.touched is None
    spool.append({"op": "run", "run": "a", "name": "x"})
    spool.begun(spool.peek(1)[0], "id-a")
    spool.done(spool.peek(1))
    spool.close()
    for _ in range(2):
        spool = Spool(tmp_path)
        assert spool.current["name"] == "x" and not spool.ended and spool.touched is not None
        assert spool.runs["a"]["id"] == "id-a"
        spool.close()
    spool = Spool(tmp_path)
    spool.append({"op": "status", "run": "a"})
    assert spool.ended
    spool.append({"op": "run", "run": "a"})
    assert not spool.ended
    spool.close()
    spool = Spool(tmp_path)
    assert not spool.ended
    spool.begun(spool.current, "id-b")
    assert spool.runs["a"]["ids"] == ["id-a", "id-b"]
    spool.close()


def is_locked(folder) -> bool:
    """Whether another process finds it so."""
    child = os.fork()
    if child == 0:
        file = os.open(folder / "lock", os.O_RDWR)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_folder_is_open_once(tmp_path):
    spool = Spool(tmp_path)
    assert is_locked(tmp_path)
    for _ in range(2):
        with pytest.raises(WanmoeError, match="this process still logs or sends from here"):
            Spool(tmp_path)
        # Nor does the second opening free what the first has.
        assert is_locked(tmp_path)
    child = os.fork()
    if child == 0:  # a forked worker neither holds the folder nor, at its end, gives it free
        os._exit(0)
    os.waitpid(child, 0)
    assert is_locked(tmp_path)
    spool.close()
    assert not is_locked(tmp_path)
    Spool(tmp_path).close()


def test_another_process_that_has_the_folder_is_named(tmp_path):
    (asked, told), (go, end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        spool = Spool(tmp_path)
        os.write(told, b"x")
        os.close(end)
        os.read(go, 1)
        spool.close()
        os._exit(0)
    os.read(asked, 1)
    with pytest.raises(WanmoeError, match=f"process {child} on .* still logs or sends from here"):
        Spool(tmp_path)
    os.close(end)
    os.waitpid(child, 0)
    Spool(tmp_path).close()
    for pipe in (asked, told, go):
        os.close(pipe)


def test_a_text_may_be_kept_without_some_of_it(tmp_path):
    spool = Spool(tmp_path / "spool")
    (tmp_path / "a.toml").write_text("key = secret")
    kept = spool.keep(tmp_path / "a.toml", False, lambda text: text.replace("secret", ""))
    assert (spool.folder / kept).read_text() == "key = "
    assert (tmp_path / "a.toml").read_text() == "key = secret"
    spool.close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WanmoeError, match="could not be opened .Not a directory") as caught:
        Spool(tmp_path / "file" / "spool")
    assert "\n" not in str(caught.value)
