"""A kernel's first launch, in which Triton compiles it, is surrounded; later ones are not."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from kernels_here import MODULES

from fasttta.ops import first_use, triton

launch, launch_plan = MODULES["launch"], MODULES["launch_plan"]


class Kernel:
    """Stands for a compiled function of Triton."""

    __name__ = "_rows_kernel"

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **keywords: self.launches.append((grid, args, keywords))


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels whose launch was surrounded."""
    names = []

    @contextlib.contextmanager
    def surround(name):
        yield
        names.append(name)

    monkeypatch.setattr(launch, "compiling", surround)
    monkeypatch.setattr(launch, "compiled", lambda name, seconds: names.append(f"late {name}"))
    return names


def test_once_for_a_plan(compiled, monkeypatch):
    kernel, x = Kernel(), torch.zeros(3)
    plan = launch_plan.Plan((4,), {"BLOCK": 16}, warps=4)

    def run(plan=plan, x=x, n=32, scale=0.5, weight=None):
        before = len(compiled)
        launch.run(kernel, plan, x, n, scale, weight)
        return len(compiled) - before

    assert run() == 1
    # another grid, size or scale is the same code
    assert run(launch_plan.Plan((5,), {"BLOCK": 16}, warps=4)) == 0
    assert run(n=48) == run(scale=0.1) == run(x=torch.zeros(7)) == 0
    assert run(launch_plan.Plan((4,), {"BLOCK": 32}, warps=4)) == 1
    assert run(launch_plan.Plan((4,), {"BLOCK": 16}, warps=8)) == 1
    assert len(kernel.launches) == 7
    assert compiled == 3 * ["_rows_kernel"]
    monkeypatch.setattr(launch, "_LONG", 0.0)  # as if Triton had compiled for another size
    assert run(n=1) == 1
    assert compiled[3:] == ["late _rows_kernel"]
    grid, args, keywords = kernel.launches[0]
    assert (grid, args) == ((4,), (x, 32, 0.5, None))
    assert keywords["BLOCK"] == 16


def test_a_launch_that_fails_is_surrounded_again(compiled):
    class Broken(Kernel):
        def __getitem__(self, grid):
            def fail(*args, **keywords):
                raise RuntimeError("out of resources")

            return fail

    kernel, plan = Broken(), launch_plan.Plan((1,), {}, warps=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of resources"):
            launch.run(kernel, plan)
    assert compiled == []
    kernel.__class__ = Kernel
    kernel.launches = []
    launch.run(kernel, plan)
    assert compiled == ["_rows_kernel"]


def test_the_package_says_what_is_compiled(monkeypatch, caplog):
    monkeypatch.setattr(first_use, "SHORT", 0.0)
    monkeypatch.setattr(launch, "compiling", None)
    monkeypatch.setattr(launch, "compiled", None)
    triton.kernels.cache_clear()
    triton.kernels("entropies")
    with caplog.at_level(logging.INFO, "fasttta"), first_use.recording() as made:
        launch.run(Kernel(), launch_plan.Plan((1,), {}, warps=1))
        launch.compiled("_late_kernel", 3.0)
    assert [(x.kind, x.name) for x in made] == [
        ("kernel", "_rows_kernel"),
        ("kernel", "_late_kernel"),
    ]
    assert caplog.messages[0].startswith("compiled the kernel _rows_kernel in 0.0 s")
    assert caplog.messages[1].startswith("compiled the kernel _late_kernel in 3.0 s")
