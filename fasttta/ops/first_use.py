"""What the first use of a machine or a shape makes, and how long it took: it is said and recorded.

Three things take seconds to a minute when they are first needed: the C++ library is built, Triton
compiles a kernel, a step is captured as a CUDA graph. Each is logged to ``fasttta`` at INFO, with
its seconds. One that lasts longer than a second also says on standard error that it goes on, and
how long it took in the end, where somebody waits. ``FASTTTA_MESSAGES`` says where:

``auto``     at a terminal and in interactive sessions, unless logging shows INFO of ``fasttta``
             already (the default)
``on``       always (the default of fasttta's own commands)
``off``      never; logging stays
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

_MODES = ("auto", "on", "off")
#: Seconds after which standard error says what goes on.
PATIENCE = 1.0
#: Shorter compilations are no more than reading the compiler's cache: logged at DEBUG.
SHORT = 0.1

_log = logging.getLogger("fasttta")


@dataclass(frozen=True)
class Made:
    """Something that its first use made.

    Attributes:
        kind: ``"library"`` (built), ``"kernel"`` (compiled, or read from Triton's cache) or
            ``"graph"`` (captured).
        name: the library's file, the kernel, or the shapes that were captured.
        seconds: until it was ready.
    """

    kind: str
    name: str
    seconds: float


_listeners: list[list[Made]] = []


def mode() -> str:
    """The value of ``FASTTTA_MESSAGES``: auto, on or off.

    Raises:
        ValueError: it is something else.
    """
    setting = os.environ.get("FASTTTA_MESSAGES", "auto")
    if setting not in _MODES:
        raise ValueError(f"FASTTTA_MESSAGES={setting!r} is unknown; known: {', '.join(_MODES)}")
    return setting


def _visible() -> bool:
    """Whether standard error is told: somebody waits there, and logging does not say it."""
    setting = mode()
    if setting != "auto":
        return setting == "on"
    if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
        return False
    try:
        return hasattr(sys, "ps1") or sys.stderr.isatty()
    except (AttributeError, ValueError):  # no standard error, or a closed one
        return False


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"fasttta: {text}", file=sys.stderr, flush=True)


class Telling:
    """The name of what is made, which the block may set once it knows it, and whether it made
    anything: a block that finds it ready sets ``made`` to False."""

    def __init__(self, name: str) -> None:
        self.name, self.made = name, True


def made(kind: str, name: str, seconds: float, after: str) -> None:
    """Logs and records something that has been made; ``after`` as ``telling`` has it."""
    level = logging.INFO if kind != "kernel" or seconds >= SHORT else logging.DEBUG
    _log.log(level, "%s in %.1f s: %s", after, seconds, name)
    for listener in _listeners:
        listener.append(Made(kind, name, seconds))


@contextlib.contextmanager
def telling(kind: str, name: str, during: str, after: str) -> Iterator[Telling]:
    """Says what the block makes and how long that took, and records it for ``recording``.

    Args:
        during: for standard error while it goes on, a sentence's end: "builds its C++ kernels".
        after: for the log and standard error in the end: "built its C++ kernels".
    """
    visible, said = _visible(), threading.Event()
    telling, start = Telling(name), time.perf_counter()

    def say() -> None:
        said.set()
        _say(f"{during} ...")

    timer = threading.Timer(PATIENCE, say) if visible else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield telling
    finally:
        if timer is not None:
            timer.cancel()
    seconds = time.perf_counter() - start
    if telling.made:
        made(kind, telling.name, seconds, after)
    if said.is_set():
        _say(f"{after} in {seconds:.1f} s")


@contextlib.contextmanager
def recording() -> Iterator[list[Made]]:
    """Inside the block, what is made, by any thread, is appended to the list."""
    things: list[Made] = []
    _listeners.append(things)
    try:
        yield things
    finally:
        # by identity: two lists may be equal
        _listeners[:] = [listener for listener in _listeners if listener is not things]
