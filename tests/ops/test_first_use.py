"""What is said while something is built or compiled, where, and that it is recorded."""

from __future__ import annotations

import logging
import sys
import time

import pytest

from fasttta.ops import first_use


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(first_use, "PATIENCE", 0.02)
    monkeypatch.delenv("FASTTTA_MESSAGES", raising=False)


def _make(capsys, wait=0.2, kind="library"):
    """What a block of that length prints on standard error."""
    with first_use.telling(kind, "the file", "builds kernels", "built kernels"):
        time.sleep(wait)
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


@pytest.mark.parametrize(
    ("setting", "interactive", "told"),
    [("on", False, True), ("off", True, False), ("auto", True, True), ("auto", False, False)],
)
def test_standard_error_is_told_where_somebody_waits(
    monkeypatch, capsys, setting, interactive, told
):
    monkeypatch.setenv("FASTTTA_MESSAGES", setting)
    if interactive:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    first_use._log.setLevel(logging.WARNING)  # logging does not show it
    try:
        lines = _make(capsys)
    finally:
        first_use._log.setLevel(logging.NOTSET)
    assert [line.split(" in ")[0] for line in lines] == (
        ["fasttta: builds kernels ...", "fasttta: built kernels"] if told else []
    )


def test_what_is_short_is_not_told(monkeypatch, capsys):
    monkeypatch.setenv("FASTTTA_MESSAGES", "on")
    monkeypatch.setattr(first_use, "PATIENCE", 60.0)
    assert _make(capsys, wait=0.0) == []


def test_it_is_said_once_where_logging_shows_it(monkeypatch, capsys, caplog):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with caplog.at_level(logging.INFO, "fasttta"):
        assert _make(capsys) == []
    (record,) = caplog.records
    assert record.getMessage().startswith("built kernels in 0.")
    assert record.getMessage().endswith(" s: the file")


def test_a_kernel_from_the_cache_is_logged_for_debugging(caplog, capsys):
    with caplog.at_level(logging.DEBUG, "fasttta"):
        _make(capsys, 0.0, "kernel")
        _make(capsys, 0.15, "kernel")
    assert [record.levelname for record in caplog.records] == ["DEBUG", "INFO"]


def test_failures_are_not_recorded_and_end_the_message(monkeypatch, capsys):
    monkeypatch.setenv("FASTTTA_MESSAGES", "on")
    with (
        first_use.recording() as made,
        pytest.raises(RuntimeError, match="no luck"),
        first_use.telling("library", "a", "builds", "built"),
    ):
        raise RuntimeError("no luck")
    time.sleep(0.1)
    assert made == []
    assert capsys.readouterr().err == ""


def test_recordings_are_independent():
    with first_use.recording() as outer, first_use.recording() as inner:
        with first_use.telling("kernel", "a", "compiles", "compiled"):
            pass
        with first_use.telling("library", "b", "builds", "built") as library:
            library.made = False  # another process did
    with first_use.telling("kernel", "c", "compiles", "compiled"):
        pass
    assert [(x.kind, x.name) for x in outer] == [("kernel", "a")]
    assert inner == outer
    assert outer[0].seconds >= 0
    assert first_use._listeners == []


def test_an_unknown_setting_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTTTA_MESSAGES", "loud")
    with pytest.raises(ValueError, match="FASTTTA_MESSAGES='loud' is unknown; known: auto, on"):
        first_use.mode()
