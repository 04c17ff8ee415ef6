"""The detector of shifts in a stream, against the official one and inside one."""

from __future__ import annotations

import json

import pytest
import torch
from cases import METHODS
from goldens import require

import fasttta


def test_official_sequence():
    name = "brimpr/brimpr_continual_detector.json"
    about, resets = json.loads((require(name) / name).read_text()), []
    lengths = []
    detectors = {
        name: fasttta.ShiftDetector(about["window_size"], about["threshold"]) for name in "av"
    }
    for i in range(len(about["dist_a"])):
        for name, detector in detectors.items():
            if detector.update(about[f"dist_{name}"][i]):
                resets.append([i, name])
            assert detector.z == pytest.approx(about[f"z_{name}"][i], rel=1e-9, abs=1e-9)
        lengths.append([len(d.values) for d in detectors.values()])
    assert resets == about["resets"]
    assert lengths == about["window_lengths_after"]


def test_equal_values_and_bad_ones():
    detector = fasttta.ShiftDetector(window=3)
    assert not any(detector.update(1.0) for _ in range(5))
    assert detector.z == 0
    assert not detector.update(0.5)  # below
    assert detector.update(100.0)
    assert not detector.update(1e6)  # the window begins anew
    held = list(detector.values)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="needed a finite number"):
            detector.update(value)
    assert list(detector.values) == held
    for options, match in (({"window": 1}, "window=1"), ({"threshold": 0}, "threshold=0")):
        with pytest.raises(ValueError, match=match):
            fasttta.ShiftDetector(**options)


def test_modality_that_shifts(tiny_model, tiny_batch):
    """Audio falls silent: its own discrepancy says so, and its prompts alone start again."""
    options = {**METHODS["brimpr"], "lr": 1e-6}
    adapted = fasttta.adapt(tiny_model(), "brimpr", **options)
    fresh, shifts = adapted.tuned, []
    detectors = {name: fasttta.ShiftDetector(window=5) for name in ("audio", "video")}
    for i in range(12):
        audio, video = tiny_batch(64, seed=i)
        result = adapted.step(audio * (0.05 if i >= 8 else 1), video)
        for name, detector in detectors.items():
            if detector.update(float(result.stats[f"discrepancy.{name}"])):
                shifts.append((i, name))
                moved = adapted.tuned
                adapted.load_tuned({f"prompts.{name}": fresh[f"prompts.{name}"]})
    assert shifts == [(8, "audio")]
    assert not torch.equal(moved["prompts.audio"], fresh["prompts.audio"])
