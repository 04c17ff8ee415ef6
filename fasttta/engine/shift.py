"""Noticing that a stream has turned into another one."""

from __future__ import annotations

import math
import statistics
from collections import deque


class ShiftDetector:
    """Says when a value that a method reports of each batch leaves the range of the last ones.

    A reset policy for any method, one detector for each value that is watched::

        detector = fasttta.ShiftDetector()
        for audio, video in loader:
            result = adapted.step(audio, video)
            if detector.update(float(result.stats["discrepancy.audio"])):
                adapted.reset()

    BriMPR's continual variant watches ``discrepancy.audio`` and ``discrepancy.video`` apart and
    draws only that modality's prompts anew, with Adam's moments kept: there
    ``adapted.load_tuned({"prompts.audio": fresh})`` in place of the reset. Other methods may watch
    ``losses["total"]`` or ``stats["attention_gap"].mean()``. Reading a value waits for the device.

    Args:
        window: values that are looked back at; nothing is detected before there are so many.
        threshold: in standard deviations above their mean.

    Attributes:
        z: of the last value against the window before it; 0 where that held fewer than two.

    Source: ``detect_window`` in the official BriMPR code.
    """

    def __init__(self, window: int = 10, threshold: float = 5.0) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 2:
            raise ValueError(f"window={window!r}: needed an integer of at least 2")
        if not isinstance(threshold, (int, float)) or not threshold > 0:
            raise ValueError(f"threshold={threshold!r}: needed a number above 0")
        self.window, self.threshold = window, threshold
        self.values: deque[float] = deque(maxlen=window)
        self.z = 0.0

    def update(self, value: float) -> bool:
        """Takes the next value; true: it is a shift, and the window begins anew behind it.

        Raises:
            ValueError: the value is not finite (of a batch that did not count); nothing changes.
        """
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"value={value}: needed a finite number")
        self.z = 0.0
        if len(self.values) > 1:
            away = value - statistics.fmean(self.values)
            spread = statistics.stdev(self.values)
            # values that were all alike: anything above is far away
            self.z = away / spread if spread else math.copysign(math.inf, away) if away else 0.0
        shifted = len(self.values) == self.window and self.z > self.threshold
        if shifted:
            self.values.clear()
        else:
            self.values.append(value)
        return shifted
