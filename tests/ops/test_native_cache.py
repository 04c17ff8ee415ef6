"""The cache of the C++ library: whose it is, whether it is whole, and what happens otherwise."""

from __future__ import annotations

import ctypes
import os
import shlex
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fasttta.ops import native, native_build, native_cache

AS_ROOT = pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away"
)
NEEDS_COMPILER = pytest.mark.skipif(
    native.mode() == "off" or native.compiler() is None or native.ninja() is None,
    reason="there is no C++ compiler, no ninja, or FASTTTA_NATIVE=off",
)

REPORT = """
import json, os, sys, warnings
import torch
import fasttta.functional as F
from fasttta import environment
from fasttta.ops import native
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    value = [F.entropy(torch.arange(6.0).view(2, 3)).tolist() for _ in range(2)]
outcome = native.attempt()
print(json.dumps({{"path": outcome.path and str(outcome.path), "reason": outcome.reason,
    "warnings": [str(w.message) for w in caught if "fasttta" in str(w.message)],
    "value": value, "doctor": environment.table(environment.diagnose())}}))
"""


@pytest.fixture(scope="session")
def library():
    """The bytes of a library as the linker makes it."""
    path = native.attempt().path
    assert path is not None, native.attempt().reason
    return path.read_bytes()[: -native_cache._TRAILER]


def _stand_in(path: Path, links: Path, library: Path) -> Path:
    """A compiler that compiles nothing and links a library that is there; it notes that."""
    real, quoted = native.compiler(), [shlex.quote(str(x)) for x in (links, library)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) exec {real} --version;; '
        f"*-shared*) echo link >>{quoted[0]}; exec cp {quoted[1]} library.so;; "
        f'*) while [ "$1" != -o ]; do shift; done; : >"$2";; esac\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def compiler(tmp_path, library):
    (tmp_path / "whole.so").write_bytes(library)
    return _stand_in(tmp_path / "tools" / "a compiler", tmp_path / "links", tmp_path / "whole.so")


def _builds(tmp_path) -> int:
    links = tmp_path / "links"
    return len(links.read_text().splitlines()) if links.exists() else 0


def _run(tmp_path, before="", check=True, **environment):
    import json

    settings = {k: v for k, v in os.environ.items() if not k.startswith("FASTTTA_NATIVE")}
    settings |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir(exist_ok=True)
    (tmp_path / "tmp").chmod(0o1777)
    for name, value in environment.items():
        settings.pop(name, None) if value is None else settings.__setitem__(name, str(value))
    done = subprocess.run(
        [sys.executable, "-P", "-c", REPORT.format(before=before)],
        capture_output=True, text=True, env=settings, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["value"] == [[pytest.approx(0.8323, abs=1e-3)] * 2] * 2
    return report


def test_who_may_write(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    assert native_cache.distrust(folder) is None
    for mode in (0o770, 0o702, 0o777, 0o1777):
        folder.chmod(mode)
        assert f"others may write to {folder} (mode {mode:o})" in native_cache.distrust(folder)
    folder.chmod(0o755)
    assert native_cache.distrust(folder) is None
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert native_cache.distrust(link) is None
    folder.chmod(0o777)
    assert str(folder) in native_cache.distrust(link)
    folder.chmod(0o700)
    tmp_path.chmod(0o777)
    assert f"others may write to {tmp_path}" in native_cache.distrust(folder)
    tmp_path.chmod(0o1777)  # as /tmp is
    assert native_cache.distrust(folder) is None
    with pytest.raises(FileNotFoundError):
        native_cache.distrust(tmp_path / "none")


@AS_ROOT
def test_whose_it_is(tmp_path):
    folder, file = tmp_path / "cache", tmp_path / "cache" / "a.so"
    folder.mkdir(mode=0o700)
    (tmp_path / "built").write_bytes(b"library")
    native_cache.store(tmp_path / "built", file)
    assert native_cache.is_intact(file)
    os.chown(file, 54321, 54321)
    assert not native_cache.is_intact(file)
    os.chown(folder, 54321, 54321)
    assert "belongs to uid 54321, this process runs as 0" in native_cache.distrust(folder)


def test_what_is_intact(tmp_path):
    built, file = tmp_path / "built", tmp_path / "a.so"
    built.write_bytes(b"library" * 100)
    native_cache.store(built, file)
    assert not built.exists()
    assert stat.S_IMODE(file.stat().st_mode) == 0o700
    data = file.read_bytes()
    assert data.startswith(b"library" * 100)
    assert native_cache.is_intact(file)
    flipped = bytearray(data)
    flipped[3] ^= 1
    for damaged in (b"", b"junk", data[:1], data[: len(data) // 2], data[:-1], data + b"x",
                    data[-79:], bytes(flipped), data[:-1] + b"g"):  # fmt: skip
        file.write_bytes(damaged)
        assert not native_cache.is_intact(file), damaged[:10]
    file.write_bytes(data)
    assert native_cache.is_intact(file)
    file.chmod(0o770)
    assert not native_cache.is_intact(file)
    file.chmod(0o700)
    (tmp_path / "link.so").symlink_to(file)
    assert not native_cache.is_intact(tmp_path / "link.so")
    assert not native_cache.is_intact(tmp_path / "none.so")
    assert not native_cache.is_intact(tmp_path)


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTTA_CACHE", str(tmp_path / "a" / "b"))
    assert native.cache_folder() == tmp_path / "a" / "b" / "native"
    assert not (tmp_path / "a").exists()
    assert native_cache.folder_and_reason() == (tmp_path / "a" / "b" / "native", None)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    monkeypatch.delenv("FASTTTA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert native.cache_folder() == tmp_path / "x" / "fasttta" / "native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    assert native.cache_folder() == tmp_path / "h" / ".cache" / "fasttta" / "native"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    native_cache.private_folder.cache_clear()
    try:
        folder, reason = native_cache.folder_and_reason()
        assert folder == tmp_path / f"fasttta-{os.geteuid()}"
        assert reason == native.cache_note() == "this user has no home folder"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for spoil in (lambda: folder.chmod(0o777), lambda: _as_link(folder, tmp_path)):
            spoil()
            native_cache.private_folder.cache_clear()
            other = native_cache.private_folder()
            assert other != folder
            assert native_cache.distrust(other) is None
    finally:
        native_cache.private_folder.cache_clear()


def _as_link(folder, elsewhere):
    folder.rmdir()
    (elsewhere / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(elsewhere / "elsewhere")


def test_commands_of_compilers(tmp_path, monkeypatch):
    tool = tmp_path / "with space" / "cc"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho version 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    for named, words in (
        (str(tool), [str(tool)]),
        (f"'{tool}'", [str(tool)]),
        (f"'{tool}' -O2 -g", [str(tool), "-O2", "-g"]),
        ("cc -O2", [str(tool), "-O2"]),
        ("cc", [str(tool)]),
        (f"cc '{tool}'", [str(tool), str(tool)]),
    ):
        monkeypatch.setenv("CXX", named)
        assert native_build.words(native.compiler()) == words
        assert native_build.version(native.compiler()) == "version 1\n"
    for named in ("none -O2", "'unclosed", "/none/g++"):
        monkeypatch.setenv("CXX", named)
        assert native.compiler() is None
    names = [native.library_name(f"{shlex.quote(str(tool))}{x}") for x in ("", " -O2", " -O3")]
    assert len(set(names)) == 3
    monkeypatch.setenv("CXX", " ")
    assert native.compiler() is not None


def test_a_lock_that_hangs_and_one_that_is_stale(tmp_path, monkeypatch):
    path, order = tmp_path / "a.lock", []
    path.write_text("left by a process that died")
    held, go = threading.Event(), threading.Event()

    def hold():
        with native_cache.locked(path):
            held.set()
            go.wait(30)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    monkeypatch.setattr(native_cache, "_PATIENCE", 0.0)
    with native_cache.locked(path):  # it is not waited for longer than the patience
        order.append("impatient")
    monkeypatch.setattr(native_cache, "_PATIENCE", 60.0)
    go.set()
    with native_cache.locked(path):
        order.append("second")
    thread.join()
    assert order == ["impatient", "first", "second"]


def _empty_library(folder):
    source, target = folder / "empty.c", folder / "empty.so"
    source.write_text("int nothing;\n")
    command = [*native_build.words(native.compiler()), "-x", "c", "-shared", source, "-o", target]
    subprocess.run(command, check=True)
    ctypes.CDLL(target)


@NEEDS_COMPILER
def test_damage_is_mended(tmp_path, compiler):
    """Truncated at several lengths, empty, junk, a library that registers nothing, a writable
    file: built again each, once, and no process dies."""
    environment = {"FASTTTA_CACHE": tmp_path / "cache", "CXX": f"'{compiler}' -g0"}
    first = _run(tmp_path, **environment)
    assert first["warnings"] == []
    path = Path(first["path"])
    good = path.read_bytes()
    assert _builds(tmp_path) == 1
    assert _run(tmp_path, **environment)["path"] == str(path)
    assert _builds(tmp_path) == 1
    _empty_library(tmp_path)
    native_cache.store(tmp_path / "empty.so", tmp_path / "stored.so")
    for i, damaged in enumerate(
        (good[: len(good) // 2], b"", (tmp_path / "stored.so").read_bytes()), start=2
    ):
        path.unlink()  # a mapped file may not be written to
        path.write_bytes(damaged)
        path.chmod(0o700)
        report = _run(tmp_path, **environment)
        assert (report["path"], report["warnings"]) == (str(path), [])
        assert native_cache.is_intact(path)
        assert _builds(tmp_path) == i


@NEEDS_COMPILER
def test_a_compiler_that_makes_nothing_of_use(tmp_path):
    """Its library loads and registers nothing: no recursion, PyTorch's operations serve."""
    _empty_library(tmp_path)
    compiler = _stand_in(tmp_path / "cc", tmp_path / "links", tmp_path / "empty.so")
    report = _run(tmp_path, FASTTTA_CACHE=tmp_path / "cache", CXX=compiler)
    assert report["path"] is None
    assert "has no kernel of adaptation_head" in report["reason"]
    (warning,) = report["warnings"]
    assert "has no kernel of" in warning
    assert _builds(tmp_path) == 2


@NEEDS_COMPILER
def test_a_folder_of_others_is_not_used(tmp_path, compiler):
    """Nothing is loaded from a folder that others may write to; a private one serves, and doctor
    and one warning say so."""
    cache = tmp_path / "cache" / "native"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    planted = cache / native.library_name(str(compiler))
    planted.write_bytes(b"never read")
    report = _run(tmp_path, FASTTTA_CACHE=tmp_path / "cache", CXX=compiler)
    private = tmp_path / "tmp" / f"fasttta-{os.geteuid()}"
    assert Path(report["path"]).parent == private
    (warning,) = report["warnings"]
    assert f"keeps its C++ kernels in {private}" in warning
    assert f"others may write to {cache}" in warning
    assert f"others may write to {cache}" in report["doctor"]
    assert planted.read_bytes() == b"never read"


@AS_ROOT
@NEEDS_COMPILER
def test_a_user_without_home_or_passwd_entry(tmp_path, compiler):
    """As docker run --user 54321 has it."""
    for folder in (tmp_path, tmp_path.parent):  # which pytest closes to others
        folder.chmod(0o755)
    leave = "os.setgroups([]); os.setresgid(54321, 54321, 54321); os.setresuid(54321, 54321, 54321)"
    environment = {"HOME": None, "XDG_CACHE_HOME": None, "FASTTTA_CACHE": None}
    (tmp_path / "links").touch()
    (tmp_path / "links").chmod(0o666)
    report = _run(tmp_path, before=leave, CXX=compiler, **environment)
    assert report["path"] is None or "fasttta-54321" in report["path"]
    assert "no home folder" in report["doctor"]
    (warning,) = report["warnings"]
    assert "no home folder" in warning or report["path"] is None


def test_a_process_that_dies_lets_go(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from fasttta.ops import native_cache\n"
        "with native_cache.locked(Path(sys.argv[1])): os._exit(9)"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "a.lock")]
    assert subprocess.run(command, check=False).returncode == 9
    with native_cache.locked(tmp_path / "a.lock"):
        pass
