"""Runs a command: errors as one message in place of a traceback, warnings as text, the exit
status."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable

BROKEN_PIPE, INTERRUPTED = 141, 130  # as shells count: 128 + the signal's number
_HINT = "--traceback shows where"


class UserCodeError(ValueError):
    """Code that the user named failed; ``__cause__`` is what it raised."""

    def __str__(self) -> str:
        return f"{super().__str__()}; {_HINT}"


def run(command: Callable[[], int], show_traceback: bool = False) -> int:
    """Runs a command; returns the exit status: 2 where the command line, a file or the user's code
    is at fault, 1 for an unexpected error.

    Args:
        show_traceback: print the traceback in front of the message.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = command()
            sys.stdout.flush()  # raises for a closed pipe here, not when the interpreter ends
            return status
        except BrokenPipeError:
            drop_output()
            return BROKEN_PIPE
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                _say("\r\x1b[K", end="")  # erases a progress bar
            return INTERRUPTED
        except (ValueError, TypeError, OSError, ImportError) as error:
            _say_error(error, show_traceback, str(error) or type(error).__name__)
            return 2
        except Exception as error:
            text = f"{type(error).__name__}: {error}; this should not happen, please report it"
            _say_error(error, show_traceback, f"{text} ({_HINT})")
            return 1


def drop_output() -> None:
    """Discards buffered output: the reader of standard output is gone, and the interpreter's
    last flush must not fail."""
    with contextlib.suppress(OSError, ValueError):  # standard output without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _say_error(error: BaseException, show_traceback: bool, message: str) -> None:
    if show_traceback:
        _say("".join(traceback.format_exception(error)), end="")
    _say(f"fasttta: {message}")


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    _say(f"warning: {message}")


def _say(text: str, end: str = "\n") -> None:
    with contextlib.suppress(BrokenPipeError):  # standard error goes to the same closed pipe
        print(text, end=end, file=sys.stderr, flush=True)
