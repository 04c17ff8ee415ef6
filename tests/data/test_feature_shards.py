"""FeatureCache: its folder, damaged files, killed and concurrent processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from caching import adapting, all_same, shards
from places import SUPPORT

from fasttta.data import FeatureCache

# the tiny model's features take 480 bytes a sample: three samples a shard
SHARD_MB = 0.0014


@pytest.fixture
def read(tiny_model):
    """Makes a method, READ unless named, on the tiny model."""

    def make(method="read", model=None, **options):
        return adapting(model or tiny_model(), method, **options)

    return make


def _write(read, batches, folder):
    list(read("source").stream(batches, cache=FeatureCache(folder)))
    (file,) = shards(folder)
    return file, file.read_bytes()


def _regions(data):
    """Positions in every part of a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = [8, 9, data.index(b"kind") + 8, data.index(b"float32"), data.index(b"data_offsets")]
    row = (len(data) - start) // 5
    rows = [start + i * row + at for i in range(5) for at in (0, row // 2, row - 1)]
    return [*range(8), *header, data.index(b"F32"), start - 1, *rows]


def _damages(data):
    for at in _regions(data):
        yield f"byte {at}", data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        yield f"cut at {length}", data[:length]
    yield "longer", data + b"\0"
    yield "zeros", bytes(len(data))
    yield "text", b"not a shard"


def test_damaged_shards_are_noticed_and_rebuilt(read, tiny_batch, tmp_path):
    batch = tiny_batch()
    file, data = _write(read, [batch], tmp_path)
    expected = list(read("source").stream([batch]))
    count = 0
    adapted = read("source")
    for what, damaged in _damages(data):
        file.write_bytes(damaged)
        adapted.encoded.clear()
        with pytest.warns(RuntimeWarning, match=f"{file.name}.*is damaged") as caught:
            results = list(adapted.stream([batch], cache=FeatureCache(tmp_path)))
        assert len(caught) == 1, what
        assert caught[0].filename == __file__
        assert all_same(expected, results), what
        assert adapted.encoded == [5], what
        assert [p.read_bytes() for p in shards(tmp_path)] == [data], what
        count += 1
    assert count > 30


def test_damage_of_one_shard_leaves_the_others(read, tiny_batch, tmp_path):
    batch = tiny_batch(9)
    list(read().stream([batch], cache=FeatureCache(tmp_path, shard_mb=SHARD_MB)))
    first, *others = shards(tmp_path)
    assert len(others) == 2
    data = first.read_bytes()
    cache, adapted = FeatureCache(tmp_path), read()
    stream = adapted.stream([batch, batch, batch, batch], cache=cache)
    next(stream)
    # after it has been read once: checksums are compared every time
    first.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.warns(RuntimeWarning, match=first.name):
        next(stream)
    assert adapted.encoded == [3]
    assert not first.exists()
    others[0].unlink()
    next(stream)  # removed: not damaged, only missing
    assert adapted.encoded == [3, 3]
    next(stream)
    assert adapted.encoded == [3, 3]


def test_files_that_are_none_of_ours(read, tiny_batch, tmp_path):
    file, data = _write(read, [tiny_batch()], tmp_path)
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    (tmp_path / f"{'0' * 32}-{'1' * 32}.safetensors").write_bytes(b"of another model")
    litter = tmp_path / "killed.part"
    litter.write_bytes(data[:50])
    recent = tmp_path / f"{file.name}.part"
    recent.write_bytes(data[:50])
    os.utime(litter, (0, time.time() - 7200))
    adapted = read("source")
    list(adapted.stream([tiny_batch()], cache=FeatureCache(tmp_path)))
    assert adapted.encoded == []
    assert recent.exists()  # somebody may be writing to it
    assert not litter.exists()
    assert (tmp_path / "notes.safetensors").read_bytes() == b"mine"


def test_a_shard_under_another_models_name(read, tiny_model, tiny_batch, tmp_path):
    """Renamed by hand: the kind is in the file too."""
    file, _ = _write(read, [tiny_batch()], tmp_path / "a")
    other = tiny_model(seed=5)
    list(read(model=other).stream([tiny_batch()], cache=FeatureCache(tmp_path / "b")))
    (theirs,) = shards(tmp_path / "b")
    theirs.unlink()
    file.rename(tmp_path / "b" / f"{theirs.name[:32]}{file.name[32:]}")
    adapted = read(model=other)
    with pytest.warns(RuntimeWarning, match="it holds features of kind"):
        list(adapted.stream([tiny_batch()], cache=FeatureCache(tmp_path / "b")))
    assert adapted.encoded == [5]


def test_disk_full(read, tiny_batch, tmp_path, monkeypatch):
    """The stream goes on; nothing half written stays."""
    batches, cache = [tiny_batch(seed=i) for i in range(2)], FeatureCache(tmp_path)
    expected = list(read().stream(batches))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.warns(RuntimeWarning, match="10 samples were not kept in.*No space left"):
            assert all_same(expected, list(read().stream(batches, cache=cache)))
    assert [p.name for p in tmp_path.iterdir()] == ["fasttta-features.txt"]
    adapted = read()
    list(adapted.stream(batches, cache=cache))
    assert adapted.encoded == [5, 5]
    assert len(shards(tmp_path)) == 1


def test_arguments(read, tiny_batch, tmp_path):
    with pytest.raises(ValueError, match="dtype='int8' is unknown; known: 'fp32'"):
        FeatureCache(tmp_path, dtype="int8")
    for size in (0, -1.0, float("nan"), "64", True):
        with pytest.raises(ValueError, match="shard_mb="):
            FeatureCache(tmp_path, shard_mb=size)
    with pytest.raises(TypeError, match="cache must be a fasttta.data.FeatureCache"):
        read().stream([tiny_batch()], cache=str(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        FeatureCache(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        FeatureCache(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"holds something else \(file\)"):
        FeatureCache(tmp_path)
    made = FeatureCache(tmp_path / "a" / "b")
    assert "hits=0" in repr(made)
    (tmp_path / "a" / "b" / "notes.txt").write_text("a feature cache by now")
    FeatureCache(str(tmp_path / "a" / "b"))


def test_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="cannot be written to"):
        FeatureCache(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_concurrent_processes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", str(SUPPORT / "caching_processes.py"), tmp_path],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["killed", "together"]
