"""fasttta: label-free adaptation of multi-modal models to shifted data while they predict."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "adapt": "entry",
    "load": "entry",
    "Adapted": "adapted",
    "StepResult": "engine.step",
    "SourceStats": "protocols",
    "ShiftDetector": "engine.shift",
    "ModelSpec": "models.spec",
    "collect_stats": "collect",
    "finetune": "finetuning",
    "FineTuning": "finetuning",
    "collect_fisher": "collect",
}
_MODULES = ("data", "evaluate", "functional", "methods", "models")

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
