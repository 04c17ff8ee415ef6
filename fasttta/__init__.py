"""fasttta: label-free adaptation of multi-modal models to shifted data while they predict."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

# what type checkers and editors read; at run time each name is imported on its first use
if TYPE_CHECKING:
    from . import data, evaluate, functional, methods, models
    from .adapted.base import Adapted
    from .adapted.collect import collect_fisher, collect_stats
    from .adapted.entry import adapt, load
    from .engine.result import StepResult
    from .engine.shift_detector import ShiftDetector
    from .models.rational.finetuning import FineTuning, finetune
    from .models.specified.spec import ModelSpec
    from .source_stats import SourceStats

__version__ = "0.1.0"

# spelled out: type checkers read no computed list
__all__ = [
    "Adapted",
    "FineTuning",
    "ModelSpec",
    "ShiftDetector",
    "SourceStats",
    "StepResult",
    "__version__",
    "adapt",
    "collect_fisher",
    "collect_stats",
    "data",
    "evaluate",
    "finetune",
    "functional",
    "load",
    "methods",
    "models",
]

_HOMES = {
    "adapt": "adapted.entry",
    "load": "adapted.entry",
    "Adapted": "adapted.base",
    "StepResult": "engine.result",
    "SourceStats": "source_stats",
    "ShiftDetector": "engine.shift_detector",
    "ModelSpec": "models.specified.spec",
    "collect_stats": "adapted.collect",
    "finetune": "models.rational.finetuning",
    "FineTuning": "models.rational.finetuning",
    "collect_fisher": "adapted.collect",
}
_MODULES = ("data", "evaluate", "functional", "methods", "models")


def _find_in_checkout(room: str) -> None:
    """Makes ``fasttta.<room>`` importable from a checkout that is on the path but not installed:
    there the room lies beside this folder, and an installation would put it inside."""
    name = f"{__name__}.{room}"
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folder = os.path.join(checkout, room)
    ours = all(
        os.path.exists(os.path.join(checkout, *parts))
        for parts in (("pyproject.toml",), ("kernels", "launch_plan.py"), ("csrc", "__init__.py"))
    )
    if not ours or importlib.util.find_spec(name) is not None:
        return
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = globals()[room] = module
    spec.loader.exec_module(module)


for _room in ("kernels", "csrc"):
    _find_in_checkout(_room)

# a type checker that saw this function would accept every name
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
