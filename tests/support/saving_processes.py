"""Processes of tests/engine/test_sharing.py: python saving_processes.py write|read|forever ..."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from cases import tiny_model

import fasttta

NAME = "blocks_u.0.attn.q.bias"


def adapted(value: float):
    """One whose state can be told by any of its values."""
    made = fasttta.adapt(tiny_model(), "read")
    made.load_tuned({name: torch.full_like(x, value) for name, x in made.tuned.items()})
    return made


def value_of(loaded) -> float:
    """The value of a whole state; an error for a mixed one."""
    values = {float(v) for x in loaded.tuned.values() for v in x.unique()}
    if len(values) != 1:
        raise AssertionError(f"a mixed state: {values}")
    return values.pop()


def main(what: str, folder: str, *arguments: str) -> None:
    """Does what a process of the test of saves is started for."""
    torch.set_num_threads(1)
    if what == "write":
        state, saves = adapted(float(arguments[0])), int(arguments[1])
        for _ in range(saves):
            state.save(folder)
        print(saves)
    elif what == "forever":
        state = adapted(float(arguments[0]))
        print("ready", flush=True)
        while True:
            state.save(folder)
    else:
        model, loads = tiny_model(), 0
        while not Path(arguments[0]).exists():
            assert value_of(fasttta.load(model, folder)) in (1.0, 2.0)
            loads += 1
        print(loads)


if __name__ == "__main__":
    main(*sys.argv[1:])
