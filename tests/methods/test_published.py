"""Defaults and presets are the published ones: a change of one would change results silently."""

from __future__ import annotations

import dataclasses

import pytest

from fasttta import methods

_PROMPT = {
    "steps": 1, "score_at": "after", "views": 64, "select": 0.1, "lr": 5e-3, "weight_decay": 0.01,
    "prompt": "a photo of a", "prompt_length": None, "augment": True,
}  # fmt: skip
DEFAULTS = {
    "tent": {"steps": 1, "score_at": "before", "lr": 1e-4},
    "eata": {
        "steps": 1, "score_at": "before", "lr": 1e-4, "e_margin": None, "d_margin": 0.1,
        "fisher_weight": 1.0,
    },
    "sar": {
        "steps": 1, "score_at": "before", "lr": 1e-4, "rho": 0.05, "e_margin": None,
        "reset_below": 0.2,
    },
    "read": {"steps": 1, "score_at": "after", "lr": 1e-4},
    "abpem": {
        "steps": 1, "score_at": "after", "lr": 1e-4, "k": 8, "window": 4, "entropy_weight": 1.0,
        "balance_weight": 1.0, "attention_weight": 1.0, "balance": "mean", "heads": "mean",
        "pair": "key", "anchor": "self",
    },
    "brimpr": {
        "steps": 1, "score_at": "before", "lr": 1e-4, "prompts": (10, 10), "mask_ratio": 0.5,
        "temperature": 0.07, "teacher_scale": 0.2, "teacher_offset": 5.0, "alignment_weight": 1.0,
        "recombination_weight": 1.0, "contrast_weight": 1.0,
    },
    "tpt": _PROMPT,
    "c-tpt": {**_PROMPT, "dispersion_weight": 50.0},
    "r-tpt": {**_PROMPT, "neighbours": 20, "temperature": 0.01, "drop_self": None},
    "a-tpt": {
        **_PROMPT, "rollout": "code", "mask": "quantile", "high": 0.2, "low": 0.8, "mix_high": 0.8,
        "mix_low": 0.2, "base_view": "crop", "ensemble": "tv", "tv_map": "grid",
        "tv_temperature": 1.0, "tv_loss": False, "cam_sharpen": 0.2, "neighbours": 20,
        "similarity_temperature": 0.01, "drop_self": None,
    },
    "mta": {
        "steps": 1, "views": 64, "nearest": 0.3, "affinity": 4.0, "temperature": 0.2,
        "iterations": 5, "tolerance": 1e-6, "augment": False, "prompt": "a photo of a",
    },
    "ttc": {
        "steps": 2, "eps": 4 / 255, "lr": 1 / 255, "threshold": 0.2, "beta": 2.0,
        "prompt": "This is a photo of a",
    },
    "rada": {
        "steps": 1, "loss": None, "lr": None, "select": 0.1, "tune": "all", "weight_decay": 0.01,
        "heads": 8, "temperature": 1.0, "scale_multiplier": 1.0, "views": 64, "augment": True,
        "prompt": "a photo of a",
    },
}  # fmt: skip
PRESETS = {
    "tent": {"read-benchmark": {"lr": 1e-4}},
    "eata": {"read-benchmark": {"lr": 1e-4, "d_margin": 0.1, "fisher_weight": 1.0}},
    "sar": {"read-benchmark": {"lr": 1e-4, "rho": 0.05, "reset_below": 0.2}},
    "read": {"paper": {"lr": 1e-4}},
    "abpem": {
        "ks50-video": {"k": 8, "window": 4},
        "ks50-audio": {"k": 7, "window": 4, "attention_weight": 5.0},
        "vgg-video": {"k": 28, "window": 4},
        "vgg-audio": {"k": 30, "window": 2},
    },
    "brimpr": {"one-corrupted": {"temperature": 0.07}, "both-corrupted": {"temperature": 0.25}},
    "a-tpt": {
        "code": {"ensemble": "similarity"},
        "paper": {
            "rollout": "paper", "mask": "top", "base_view": "flip", "ensemble": "tv",
            "tv_map": "pixel",
        },
    },
    "rada": {
        "views": {"loss": "views", "lr": 5e-3, "score_at": "after"},
        "stream": {"loss": "entropy", "lr": 1e-4, "score_at": "before"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    method = methods.by_name(name)
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    assert {option: defaults[option] for option in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    """A preset sets what is published and leaves the rest at its default."""
    cls = methods.by_name(name)
    for preset, options in PRESETS[name].items():
        method = cls.preset(preset)
        expected = DEFAULTS[name] | options
        assert {option: getattr(method, option) for option in expected} == expected, preset
