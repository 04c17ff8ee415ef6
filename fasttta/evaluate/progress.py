"""A progress bar."""

from __future__ import annotations

import sys
import time


class ProgressBar:
    """A bar on standard error, drawn only on a terminal; called with (done, total, what now)."""

    def __init__(self, width: int = 30) -> None:
        self.width, self.start = width, time.perf_counter()
        self.shown = sys.stderr.isatty()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Shows that ``done`` of ``total`` parts are done, and what runs now."""
        if not self.shown:
            return
        full = self.width * done // total
        seconds = time.perf_counter() - self.start
        bar = "█" * full + "·" * (self.width - full)
        sys.stderr.write(f"\r\x1b[K{bar} {done}/{total} {seconds:.0f} s  {what}")
        if done == total:
            sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
