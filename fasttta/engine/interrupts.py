"""Cleanups that an interrupt cannot skip."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def surely(cleanup: Callable[[], object]) -> Iterator[None]:
    """Runs a cleanup after the block, also where Ctrl-C arrives while it runs: then it runs again.

    Args:
        cleanup: may run twice, or a part of it and then all of it.
    """
    try:
        try:
            yield
        finally:
            cleanup()
    finally:
        cleanup()
