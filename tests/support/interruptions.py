"""KeyboardInterrupts at chosen lines of fasttta, as Ctrl-C would raise them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fasttta

PACKAGE = str(Path(fasttta.__file__).parent)


def run(
    action: Callable[[], object],
    at: frozenset[int] | set[int] = frozenset(),
    files: tuple[str, ...] = ("",),
) -> int:
    """Runs an action, raises KeyboardInterrupt just before the lines of fasttta with these numbers
    (counted from 1 as they run), and returns how many lines ran.

    Args:
        files: only lines of files with these ends of their names.
    """
    count = 0

    def lines(frame, event, argument):
        nonlocal count
        if event == "line":
            count += 1
            if count in at:
                raise KeyboardInterrupt
        return lines

    def calls(frame, event, argument):
        name = frame.f_code.co_filename
        return lines if name.startswith(PACKAGE) and name.endswith(files) else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def sample(lines: int, most: int | None, seed: int = 0) -> Iterator[int]:
    """Line numbers in random order, at most so many; None: all."""
    numbers = random.Random(seed).sample(range(1, lines + 1), min(lines, most or lines))
    return iter(numbers)
