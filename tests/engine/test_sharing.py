"""Several writers and readers of one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from places import SUPPORT
from saving_processes import adapted, value_of

import fasttta
from fasttta.engine import folder as folders

SCRIPT = SUPPORT / "saving_processes.py"


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=SCRIPT.parent,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> int:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return int(out)


def clean(folder: Path) -> bool:
    """Whether a folder holds one save and nothing else."""
    names = sorted(path.name for path in folder.iterdir())
    record = json.loads((folder / folders.RECORD).read_text())
    return names == [folders.RECORD, record["state"]]


@pytest.mark.slow
def test_two_processes_write_and_one_reads(tmp_path):
    folder, stop = tmp_path / "save", tmp_path / "stop"
    adapted(1.0).save(folder)
    reader = start("read", folder, stop)
    writers = [start("write", folder, value, 60) for value in (1, 2)]
    assert [ended(writer) for writer in writers] == [60, 60]
    stop.touch()
    assert ended(reader) > 0
    assert clean(folder)
    assert value_of(fasttta.load(adapted(0.0).unwrap(), folder)) in (1.0, 2.0)


@pytest.mark.parametrize("lock", [True, False])
def test_threads_write_and_read(tmp_path, monkeypatch, lock):
    """The lock is of the folder as each call opens it, so that threads take turns as processes do.
    Without one no file of another writer may be removed."""
    if not lock:
        monkeypatch.setattr(folders, "fcntl", None)
    adapted(1.0).save(tmp_path)
    errors, loads = [], []
    writing = threading.Event()

    model, states = adapted(0.0).unwrap(), [adapted(1.0), adapted(2.0)]

    def write(state) -> None:
        try:
            for _ in range(10):
                state.save(tmp_path)
        except Exception as error:
            errors.append(error)

    def read() -> None:
        try:
            while not writing.is_set():
                loads.append(value_of(fasttta.load(model, tmp_path)))
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(state,)) for state in states]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    writing.set()
    reader.join()
    assert not errors
    assert loads
    assert set(loads) <= {1.0, 2.0}
    if lock:
        assert clean(tmp_path)
        return
    monkeypatch.undo()
    adapted(1.0).save(tmp_path)  # takes away what the others could not
    assert clean(tmp_path)


@pytest.mark.slow
def test_a_killed_save_leaves_the_earlier_one_and_is_cleared_away(tmp_path):
    folder = tmp_path / "save"
    adapted(1.0).save(folder)
    model = adapted(0.0).unwrap()
    for attempt in range(3):
        process = start("forever", folder, 2)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.011 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert value_of(fasttta.load(model, folder)) in (1.0, 2.0)
    adapted(1.0).save(folder)
    assert clean(folder)


def test_what_killed_saves_leave_is_removed_and_nothing_else(tmp_path, monkeypatch):
    left = [
        "state-0123456789ab-0123456789ab.safetensors", "fasttta.json-0123456789ab.part",
        "state-0123456789ab-0123456789ab.safetensors.part", "fasttta.json.part",
        "state-0123456789ab.safetensors",
    ]  # fmt: skip
    theirs = [
        "precious.txt", "state-of-the-art.safetensors", "state.safetensors", "notes.part",
        "state-0123456789ab-0123456789ab.safetensors.bak", "fasttta.json.bak",
    ]  # fmt: skip
    for name in (*left, *theirs):
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.setattr(folders, "fcntl", None)  # without a lock they may be another writer's
    adapted(1.0).save(tmp_path)
    assert all((tmp_path / name).exists() for name in (*left, *theirs))
    for name in left:
        os.utime(tmp_path / name, (1, 1))
    adapted(1.0).save(tmp_path)
    assert not any((tmp_path / name).exists() for name in left)
    monkeypatch.undo()
    for name in left:
        (tmp_path / name).write_bytes(name.encode())
    adapted(1.0).save(tmp_path)
    assert not any((tmp_path / name).exists() for name in left)
    for name in theirs:
        assert (tmp_path / name).read_bytes() == name.encode()
    assert len(list(tmp_path.iterdir())) == 2 + len(theirs)


def test_a_file_that_a_record_names_is_not_removed(tmp_path):
    """An old record may name anything: only what saves call their files is theirs."""
    adapted(1.0).save(tmp_path)
    record = json.loads((tmp_path / folders.RECORD).read_text())
    os.replace(tmp_path / record["state"], tmp_path / "precious.txt")
    text = (tmp_path / folders.RECORD).read_text().replace(record["state"], "precious.txt")
    (tmp_path / folders.RECORD).write_text(text)
    adapted(2.0).save(tmp_path)
    assert (tmp_path / "precious.txt").exists()
    assert value_of(fasttta.load(adapted(0.0).unwrap(), tmp_path)) == 2.0


def test_a_filesystem_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folders.fcntl, "flock", none)
    adapted(1.0).save(tmp_path)
    adapted(2.0).save(tmp_path)
    assert value_of(fasttta.load(adapted(0.0).unwrap(), tmp_path)) == 2.0


def test_a_lock_that_is_never_given_back(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(folders, "_PATIENCE", 0.05)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        adapted(1.0).save(tmp_path)
    finally:
        os.close(holder)
    assert value_of(fasttta.load(adapted(0.0).unwrap(), tmp_path)) == 1.0


def test_a_load_goes_on_where_the_record_has_moved_on(tmp_path, monkeypatch):
    """The record is read, then another save replaces both files."""
    adapted(1.0).save(tmp_path)
    later, read, reads = adapted(2.0), folders._record, []

    def overtaken(folder):
        reads.append(read(folder))
        if len(reads) == 1:
            later.save(folder)
        return reads[-1]

    monkeypatch.setattr(folders, "_record", overtaken)
    assert value_of(fasttta.load(adapted(0.0).unwrap(), tmp_path)) == 2.0
    assert len(reads) == 3


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        folders.os, "fsync", lambda number: (events.append("fsync"), fsync(number))[1]
    )
    monkeypatch.setattr(
        folders.os, "replace", lambda a, b: (events.append("move"), replace(a, b))[1]
    )
    adapted(1.0).save(tmp_path)
    # each file, and behind its move the folder
    assert events == ["fsync", "move", "fsync", "fsync", "move", "fsync"]
