import errno
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from triton_sparsity.bench.measure.files import (
    SUMS,
    check_sums,
    only_writer,
    write_atomic,
    write_sums,
)


def test_a_file_is_replaced_in_one_piece(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    readable = os.stat(path).st_mode & 0o777
    (tmp_path / "plain").write_bytes(b"")
    assert readable == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_no_other_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_write_leaves_no_other_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


def test_a_folder_has_one_writer_and_a_second_is_told_which(tmp_path):
    folder = tmp_path / "run"
    with only_writer(folder):
        with pytest.raises(BlockingIOError) as caught, only_writer(folder):
            pass
        said = str(caught.value)
        for part in (f"process {os.getpid()} on {socket.gethostname()}, since 2", str(folder)):
            assert part in said
        # a file's lock is another
        with only_writer(folder, "table.json"):
            (folder / "table.json").write_bytes(b"1")
    assert [p.name for p in folder.iterdir()] == ["table.json"]
    with only_writer(folder):
        pass


def test_a_folder_that_nothing_was_written_to_is_not_left(tmp_path):
    with only_writer(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from triton_sparsity.bench.measure.files import only_writer

with only_writer(Path(sys.argv[1])):
    (Path(sys.argv[1]) / ".state.pt.0.partial").write_bytes(b"half")
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_taken_and_what_it_left_goes(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"), only_writer(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / ".lock").exists()
    with only_writer(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())


def test_of_many_that_want_a_folder_one_at_a_time_has_it(tmp_path):
    inside, most, taken = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, taken
        for _ in range(50):
            with suppress(BlockingIOError), only_writer(tmp_path / "run"):
                with guard:
                    inside, taken = inside + 1, taken + 1
                    most = max(most, inside)
                time.sleep(0)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert taken > 1


def test_a_reader_between_two_writers_sees_whole_files(tmp_path):
    path = tmp_path / "file"
    contents = {bytes([n]) * 300_000 for n in range(2)}
    write_atomic(path, min(contents))
    ended = threading.Event()

    def write(content):
        while not ended.is_set():
            write_atomic(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    try:
        seen = {path.read_bytes() for _ in range(200)}
    finally:
        ended.set()
        for writer in writers:
            writer.join()
    assert seen <= contents
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_sums_name_what_is_missing_or_was_changed(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"weights")
    (tmp_path / "b").write_bytes(b"report")
    write_sums(tmp_path)
    check_sums(tmp_path)
    checked = subprocess.run(["sha256sum", "--check", SUMS], cwd=tmp_path, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    (tmp_path / "model" / "a").write_bytes(b"weighty")
    with pytest.raises(ValueError, match=rf"{tmp_path / 'model' / 'a'} is damaged"):
        check_sums(tmp_path)
    (tmp_path / "model" / "a").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path / 'model' / 'a'} is missing"):
        check_sums(tmp_path)
    (tmp_path / SUMS).write_text("no sums")
    with pytest.raises(ValueError, match=rf"{tmp_path / SUMS} is damaged"):
        check_sums(tmp_path)
