"""Detects that the distribution of a stream has shifted."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..functional import entropy
from .result import StepResult


class ShiftDetector:
    """Detects when a value that a method reports for each batch leaves the range of the last
    values.

    A reset policy for any method whose batches build on each other: with ``fasttta.adapt(model,
    method, guard=fasttta.ShiftDetector())`` the state is reset after a batch that shows a shift. Or
    by hand, with one detector for each value::

        detector = fasttta.ShiftDetector()
        for audio, video in loader:
            result = adapted.step(audio, video)
            if detector.update(float(result.stats["discrepancy.audio"])):
                adapted.reset()

    BriMPR's continual variant watches ``discrepancy.audio`` and ``discrepancy.video`` apart and
    replaces only that modality's prompts by random ones, with Adam's moments kept: there
    ``adapted.load_tuned({"prompts.audio": fresh})`` in place of the reset. Reading a value waits
    for the device.

    Args:
        window: number of past values; nothing is detected before there are so many.
        threshold: in standard deviations above their mean.
        watch: as a guard, names among ``stats`` and ``losses`` of a step, each watched apart (the
            mean of a tensor of several values); None: the discrepancies of the modalities where a
            method has them (BriMPR), else the mean entropy of the predictions before the update.

    Attributes:
        z: of the last value against the window before it; 0 where that held fewer than two.

    Source: ``detect_window`` in the official BriMPR code.
    """

    def __init__(
        self,
        window: int = 10,
        threshold: float = 5.0,
        watch: str | Sequence[str] | None = None,
    ) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or not 2 <= window <= 10**6:
            raise ValueError(f"window={window!r}: needed an integer from 2 to 1000000")
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not 0 < threshold < math.inf:
            raise ValueError(f"threshold={threshold!r}: needed a finite number above 0")
        threshold = float(threshold)
        watch = (watch,) if isinstance(watch, str) else watch
        named = isinstance(watch, Sequence) and watch and all(isinstance(x, str) for x in watch)
        if watch is not None and not named:
            raise ValueError(f"watch={watch!r}: needed names of stats or losses, or None")
        self.window, self.threshold = window, threshold
        self.watch = None if watch is None else tuple(watch)
        self.values: deque[float] = deque(maxlen=window)
        self.z = 0.0

    def update(self, value: float) -> bool:
        """Takes the next value; returns whether it is a shift, after which the window is empty.

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
            # equal values have no spread: any larger value is a shift
            self.z = away / spread if spread else math.copysign(math.inf, away) if away else 0.0
        shifted = len(self.values) == self.window and self.z > self.threshold
        if shifted:
            self.values.clear()
        else:
            self.values.append(value)
        return shifted


class Guard:
    """Watches an adapted model's steps with a detector for each value. It holds no values itself:
    they are a part of the state.

    Args:
        like: its window, threshold and watch are used.
    """

    def __init__(self, like: ShiftDetector) -> None:
        self.like = like

    def after(
        self, values: Mapping[str, tuple[float, ...]], result: StepResult
    ) -> tuple[dict[str, tuple[float, ...]], bool]:
        """The values of the last batches with those of a step, and whether one of them has left its
        range; all windows are then empty.

        Raises:
            ValueError: the step has no value of a name that is to be watched.
        """
        self._check(result)
        taken, shifted = dict(values), False
        for name, value in self._values(result).items():
            if not math.isfinite(value):  # of a batch that did not count
                continue
            detector = ShiftDetector(self.like.window, self.like.threshold)
            detector.values.extend(values.get(name, ()))
            shifted |= detector.update(value)
            taken[name] = tuple(detector.values)
        return ({} if shifted else taken), shifted

    def _check(self, result: StepResult) -> None:
        reported = result.losses | result.stats
        for name in self.like.watch or ():
            if name not in reported:
                raise ValueError(
                    f"guard: watch={name!r} is nothing that this method reports; it reports "
                    f"{', '.join(reported) or 'nothing'}"
                )

    def _values(self, result: StepResult) -> dict[str, float]:
        reported = result.losses | result.stats
        names = self.like.watch or [
            name for name in reported
            if name.startswith("discrepancy.") and name != "discrepancy.joint"
        ]  # fmt: skip
        with torch.no_grad():
            if not names:
                return {"entropy": float(entropy(result.logits_before).mean())}
            return {name: float(reported[name].double().mean()) for name in names}

    def settings(self) -> dict[str, Any]:
        """JSON-ready, without values."""
        like = self.like
        watch = None if like.watch is None else list(like.watch)
        return {"window": like.window, "threshold": like.threshold, "watch": watch}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Guard:
        """A guard of what ``settings`` returned.

        Raises:
            ValueError, TypeError: a setting is out of range.
        """
        return cls(ShiftDetector(**{n: settings[n] for n in ("window", "threshold", "watch")}))

    def check_values(self, values: object) -> dict[str, tuple[float, ...]]:
        """Values of the last batches from a file.

        Raises:
            ValueError: they are not such values.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"guard.values: needed an object, found {values!r:.60}")
        for name, past in values.items():
            if self.like.watch is not None and name not in self.like.watch:
                raise ValueError(f"guard.values: {name!r} is not watched")
            good = isinstance(past, (list, tuple)) and len(past) <= self.like.window
            # squares of them must be finite as well
            if not good or not all(type(x) in (int, float) and abs(x) < 1e150 for x in past):
                raise ValueError(
                    f"guard.values.{name}: needed at most {self.like.window} numbers below 1e150, "
                    f"found {past!r:.60}"
                )
        return {name: tuple(map(float, past)) for name, past in values.items()}
