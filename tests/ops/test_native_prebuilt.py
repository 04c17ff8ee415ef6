"""The library that a wheel carries: used where it fits, and only there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fasttta.ops import native, native_build, native_prebuilt


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder as an installed wheel has it, with bytes in place of a library."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for path in native_build.sources():
        shutil.copy(path, folder)
    monkeypatch.setattr(native_build, "folder", lambda: folder)
    monkeypatch.setattr(native_build, "compiler", lambda: "c++")
    monkeypatch.setattr(native_build, "ninja", lambda: "ninja")
    monkeypatch.setattr(
        native_build, "build", lambda compiler, ninja, target: target.write_bytes(b"kernels")
    )
    assert native_prebuilt.store(folder) is None
    return folder


def test_it_is_found_where_it_was_made(installed):
    assert native_prebuilt.find() == (installed / "library.so", None)
    assert native._library() == installed / "library.so"


def test_without_one_nothing_is_said(installed):
    (installed / "library.so").unlink()
    assert native_prebuilt.find() == (None, None)


def _changed(folder, **facts):
    path = folder / "library.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"torch": "2.1"}, "made for torch 2.1, found"),
        ({"system": "darwin"}, "made for system darwin, found"),
        ({"machine": "sparc"}, "made for machine sparc, found"),
        ({"capability": "VSX"}, "made for capability VSX, found"),
        ({"instruction_sets": ["avx1024", "avx"]}, "this processor lacks avx1024"),
        ({"library": "0" * 64}, "not the one that was stored"),
        ({"sources": "0" * 64}, "made of other sources"),
    ],
)
def test_one_that_does_not_fit_is_not_used(installed, facts, reason):
    _changed(installed, **facts)
    path, why = native_prebuilt.find()
    assert path is None
    assert reason in why


@pytest.mark.parametrize("damage", ["library", "source", "facts", "no facts", "empty facts"])
def test_a_damaged_one_is_not_used(installed, damage):
    if damage == "library":
        (installed / "library.so").write_bytes(b"kernelz")
    elif damage == "source":
        source = sorted(installed.glob("*.cpp"))[0]
        source.write_text(source.read_text() + "\n")
    elif damage == "facts":
        (installed / "library.json").write_text("{")
    elif damage == "no facts":
        (installed / "library.json").unlink()
    else:
        (installed / "library.json").write_text("{}")
    path, why = native_prebuilt.find()
    assert path is None
    assert why


def test_more_instruction_sets_than_needed_are_no_reason(installed):
    _changed(installed, instruction_sets=[])
    assert native_prebuilt.find()[0] is not None


def test_the_reason_is_part_of_the_error(installed, monkeypatch, caplog):
    _changed(installed, torch="2.1")
    monkeypatch.setattr(native, "compiler", lambda: None)
    with caplog.at_level("INFO", "fasttta"), pytest.raises(native.BuildError, match=r"torch 2\.1"):
        native._library()
    assert "the C++ library of the wheel is not used: it was made for torch 2.1" in caplog.text


def test_a_failed_build_leaves_no_older_library(installed, monkeypatch):
    def fail(compiler, ninja, target):
        raise native.BuildError("out of luck")

    monkeypatch.setattr(native_build, "build", fail)
    with pytest.raises(native.BuildError, match="out of luck"):
        native_prebuilt.store(installed)
    assert native_prebuilt.find() == (None, None)
    monkeypatch.setattr(native_build, "compiler", lambda: None)
    assert native_prebuilt.store(installed) == "there is no C++ compiler"


def test_instruction_sets_of_both_kinds_of_processors(monkeypatch):
    for text, wanted in (
        (
            "flags\t\t: fpu sse2 hypervisor avx512_bf16 nonstop_tsc pni",
            ["avx512_bf16", "pni", "sse2"],
        ),
        ("Features\t: fp asimd bf16", ["asimd", "bf16", "fp"]),
        ("an unknown one", []),
    ):
        monkeypatch.setattr(native_build, "processor", lambda text=text: text)
        assert native_prebuilt.instruction_sets() == wanted


def test_it_is_for_any_release_of_a_minor_version(installed, monkeypatch):
    major, minor, *_ = torch.__version__.split(".")
    monkeypatch.setattr(torch, "__version__", f"{major}.{minor}.9+cu130")
    assert native_prebuilt.find()[0] is not None
    monkeypatch.setattr(torch, "__version__", f"{major}.{int(minor) + 1}.0")
    assert native_prebuilt.find()[0] is None
