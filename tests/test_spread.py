"""How the tests are spread over processes: tests/conftest.py's choice where no -n is given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from places import TESTS

HERE = TESTS


@pytest.fixture
def chosen(pytestconfig, monkeypatch):
    """The number of workers and the mode that conftest chooses, on four cores without a GPU."""
    conftest = pytestconfig.pluginmanager.get_plugin(str(HERE / "conftest.py"))

    def choose(*paths, gpu=False, **options):
        monkeypatch.setattr(conftest, "CORES", 4)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        options = {"usepdb": False, "collectonly": False, "dist": "no", **options}
        config = SimpleNamespace(args=[str(x) for x in paths], option=SimpleNamespace(**options))
        conftest.pytest_cmdline_main(config)
        return getattr(config.option, "numprocesses", None), config.option.dist

    return choose


def test_a_worker_a_core(chosen):
    assert chosen(HERE, numprocesses=None) == (4, "worksteal")
    files = HERE / "ops/test_operations.py", HERE / "engine/test_state.py"
    assert chosen(*files, numprocesses=None) == (4, "worksteal")
    assert chosen(HERE, numprocesses=None, dist="loadfile") == (4, "loadfile")


def test_one_process_where_workers_do_not_help(chosen):
    file = HERE / "ops/test_operations.py"
    assert chosen(file, numprocesses=None) == (None, "no")
    assert chosen(f"{file}::test_a", f"{file}::test_b", numprocesses=None) == (None, "no")
    assert chosen(HERE, numprocesses=None, gpu=True) == (None, "no")
    assert chosen(HERE, numprocesses=None, usepdb=True) == (None, "no")


def test_what_is_asked_for_stays(chosen):
    for number in (0, 3):
        assert chosen(HERE, numprocesses=number) == (number, "no")
    assert chosen(HERE) == (None, "no")  # without pytest-xdist
