"""One thread at a time, and cleanups that an interrupt cannot skip."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


@contextlib.contextmanager
def surely(cleanup: Callable[[], object]) -> Iterator[None]:
    """Runs a cleanup behind the block, also where Ctrl-C arrives while it runs: then it runs again.

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


class Turn:
    """A lock that the thread which holds it may take again. Copies and pickles are new locks."""

    def __init__(self) -> None:
        # RLock: its release by a thread that does not hold it is an error, so that the release
        # may be tried without knowing how far an interrupted acquire came
        self._lock = threading.RLock()
        self._owner: int | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Waits until no other thread is inside."""
        thread = threading.get_ident()
        if self._owner == thread:
            yield
            return
        with surely(functools.partial(self._leave, thread)):
            self._lock.acquire()
            self._owner = thread
            yield

    def _leave(self, thread: int) -> None:
        if self._owner == thread:
            self._owner = None
        with contextlib.suppress(RuntimeError):  # not held
            self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


def exclusive(method: F) -> F:
    """A method of an object with a ``_turn``, for one thread at a time. Under ``torch.compile`` it
    runs as it is: traced, a step's own backward pass would be lost, and every check of a value
    would warn."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(alone)(self, *args, **kwargs)
        with self._turn():
            return method(self, *args, **kwargs)

    return cast(F, alone)
