"""How float32 products are computed inside a step: in IEEE float32, or in TF32 where asked for.

PyTorch has two sets of switches, both of the whole process. The new one is a tree,
``torch.backends.fp32_precision`` over those of a backend over those of its operations, where
``"none"`` takes the parent's value. The legacy one, ``torch.set_float32_matmul_precision`` and
``torch.backends.cudnn.allow_tf32``, has values of its own, and reading it raises where the two
disagree. A model's own code, ``torch.backends.cudnn.flags`` or Inductor may read either inside a
step. So a step sets both, and puts both back, whatever they were. A step on a CPU leaves all as
they are where they are as PyTorch starts: its products are in IEEE float32 then.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

_BACKENDS = ("generic", "cuda", "mkldnn")
_OPERATIONS = [(b, op) for b in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]
# parents first: one that says "none" shows what its children themselves say
_NODES = [*((b, "all") for b in _BACKENDS), *_OPERATIONS]

_get, _set = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter

AT_START = (*("none",) * 4, "tf32", "tf32", *("none",) * 3)  # values of ``_NODES`` in a new process
shown_nodes = functools.partial(itertools.starmap, _get, _NODES)  # 2 us, where a step takes 60


class Switches(NamedTuple):
    """The switches as they are set.

    Attributes:
        nodes: of ``_NODES``, ``"none"`` where the parent decides.
        matmul: legacy, ``"highest"``, ``"high"`` or ``"medium"``.
        convolutions: legacy, whether cuDNN may use TF32.
    """

    nodes: tuple[str, ...]
    matmul: str
    convolutions: bool


_MODES = {
    # oneDNN stays in float32: TF32 is a type of GPUs
    "ieee": Switches(("ieee",) * 9, "highest", False),
    "tf32": Switches(("tf32", "tf32", "ieee", *("tf32",) * 3, *("ieee",) * 3), "high", True),
}

_LOCK = threading.Lock()
_running: dict[object, str] = {}  # the mode of every block that is open, in all threads
_outside: list[Switches] = []  # what was set before the first of them; empty if none is open


@contextlib.contextmanager
def float32_products(mode: str) -> Iterator[None]:
    """Inside the block float32 products are computed as ``mode`` says: ``"ieee"`` or ``"tf32"``.

    Blocks of several threads share the switches: they are put back when the last one ends, and as
    long as one of them asks for ``"ieee"``, all have it.
    """
    block = object()

    def leave() -> None:
        with _LOCK:
            _running.pop(block, None)
            _apply()

    # an interrupt may end the first call; `with surely(leave)` can be interrupted as it exits
    try:
        try:
            with _LOCK:
                if not _outside:
                    take(_outside)
                _running[block] = mode
                _apply()
            yield
        finally:
            leave()
    finally:
        leave()


def _apply() -> None:
    if _running:
        put(_MODES["ieee" if "ieee" in _running.values() else "tf32"])
    elif _outside:
        put(_outside[0])
        _outside.clear()


def take(into: list[Switches]) -> None:
    """Appends the values of all switches, also of those that disagree, to a list. To read them it
    changes some: ``put`` has to follow."""
    nodes: list[str] = []
    try:
        for node in _NODES:
            nodes.append(_get(*node))
            if node[1] == "all":
                _set(*node, "none")
        _follow_parents(nodes)
        for backend in ("cuda", "mkldnn"):
            _set(backend, "matmul", "ieee")  # agrees with every legacy value
        with _quiet():
            matmul = torch.get_float32_matmul_precision()
        # the legacy value is read beside new ones that are likely to agree; else that raises
        tf32 = nodes[_NODES.index(("cuda", "conv"))] == "tf32"
        for operation in ("conv", "rnn"):
            _set("cuda", operation, "tf32" if tf32 else "ieee")
        try:
            legacy = torch._C._get_cudnn_allow_tf32()
        except RuntimeError:
            legacy = not tf32
        into.append(Switches(tuple(nodes), matmul, legacy))
    except BaseException:
        for node, value in zip(_NODES, nodes, strict=False):
            _set(*node, value)
        raise


def _follow_parents(nodes: list[str]) -> None:
    """PyTorch begins with TF32 in cuDNN as a default, to which no call can return: it reads as
    "tf32", but gives way to a parent that says anything, as a "tf32" that was set does not. Where a
    parent does, such a node is taken as "none", which means the same."""
    if nodes[_NODES.index(("generic", "all"))] == nodes[_NODES.index(("cuda", "all"))] == "none":
        return
    _set("cuda", "all", "ieee")
    for operation in ("conv", "rnn"):
        i = _NODES.index(("cuda", operation))
        if nodes[i] == "tf32" and _get(*_NODES[i]) == "ieee":
            nodes[i] = "none"


def put(switches: Switches) -> None:
    """Sets all switches, also where ``torch.backends.disable_global_flags`` forbids assignments."""
    with _quiet():
        torch.set_float32_matmul_precision(switches.matmul)
    torch._C._set_cudnn_allow_tf32(switches.convolutions)
    # last: the legacy calls also write to these
    for node, value in zip(_NODES, switches.nodes, strict=True):
        _set(*node, value)


_warned: list[bool] = []


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Some versions of PyTorch warn once in a process that the legacy switches are old."""
    if _warned:
        return contextlib.nullcontext()
    _warned.append(True)
    return warnings.catch_warnings(action="ignore")
