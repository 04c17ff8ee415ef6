"""Noticing that a stream has turned into another one."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..functional import entropy
from .state import State
from .step import StepResult


class ShiftDetector:
    """Says when a value that a method reports of each batch leaves the range of the last ones.

    A reset policy for any method whose batches build on each other: with ``fasttta.adapt(model,
    method, guard=fasttta.ShiftDetector())`` adaptation begins anew behind a batch that shows a
    shift. Or by hand, one detector for each value that is watched::

        detector = fasttta.ShiftDetector()
        for audio, video in loader:
            result = adapted.step(audio, video)
            if detector.update(float(result.stats["discrepancy.audio"])):
                adapted.reset()

    BriMPR's continual variant watches ``discrepancy.audio`` and ``discrepancy.video`` apart and
    draws only that modality's prompts anew, with Adam's moments kept: there
    ``adapted.load_tuned({"prompts.audio": fresh})`` in place of the reset. Reading a value waits
    for the device.

    Args:
        window: values that are looked back at; nothing is detected before there are so many.
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
        if isinstance(window, bool) or not isinstance(window, int) or window < 2:
            raise ValueError(f"window={window!r}: needed an integer of at least 2")
        if not isinstance(threshold, (int, float)) or not threshold > 0:
            raise ValueError(f"threshold={threshold!r}: needed a number above 0")
        watch = (watch,) if isinstance(watch, str) else watch
        if watch is not None and not (watch and all(isinstance(name, str) for name in watch)):
            raise ValueError(f"watch={watch!r}: needed names of stats or losses, or None")
        self.window, self.threshold = window, threshold
        self.watch = None if watch is None else tuple(watch)
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


class Guard:
    """A detector for each value that is watched of an adapted model's steps.

    Args:
        like: whose window, threshold and watch they have.
    """

    def __init__(self, like: ShiftDetector) -> None:
        self.like = like
        self.detectors: dict[str, ShiftDetector] = {}
        self._checked = False

    def step(self, run: Callable[[], StepResult], state: State) -> StepResult:
        """A step, and behind it, where it shows a shift, a reset of the state it was on; its
        ``.stats["reset"]`` says which.

        Raises:
            ValueError: the step has no value of a name that is to be watched; it is undone.
        """
        restore = None if self._checked else state.snapshot()
        result = run()
        if restore is not None:
            try:
                self._check(result)
            except ValueError:
                restore()
                raise
            self._checked = True
        shifted = self.shifted(result)
        if shifted:
            state.reset()
        with torch.inference_mode(False):
            result.stats["reset"] = torch.tensor(shifted, device=result.logits.device)
        return result

    def shifted(self, result: StepResult) -> bool:
        """Takes a step's values; true: one of them has left its range, and all begin anew."""
        found = False
        for name, value in self._values(result).items():
            if not math.isfinite(value):  # of a batch that did not count
                continue
            if name not in self.detectors:
                self.detectors[name] = ShiftDetector(self.like.window, self.like.threshold)
            found |= self.detectors[name].update(value)
        if found:
            self.reset()
        return found

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

    def reset(self) -> None:
        """Forgets all values."""
        self.detectors = {}

    def record(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        like = self.like
        return {
            "window": like.window,
            "threshold": like.threshold,
            "watch": like.watch,
            "values": {name: list(d.values) for name, d in self.detectors.items()},
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Guard:
        """What ``record`` returned."""
        guard = cls(ShiftDetector(record["window"], record["threshold"], record["watch"]))
        for name, values in record["values"].items():
            guard.detectors[name] = ShiftDetector(record["window"], record["threshold"])
            guard.detectors[name].values.extend(values)
        return guard
