"""Adaptation methods, one frozen dataclass each."""

from __future__ import annotations

from .abpem import ABPEM
from .atpt import ATPT
from .base import Method, Objective
from .brimpr import BriMPR
from .eata import EATA
from .episodic import Episode, Episodic
from .mta import MTA
from .prompt_tuning import CTPT, RTPT, TPT
from .rada import RAda
from .read import READ
from .sar import SAR
from .source import Source
from .tent import Tent
from .ttc import TTC

_METHODS: tuple[type[Method], ...] = (
    Source, Tent, EATA, SAR, READ, ABPEM, BriMPR, TPT, CTPT, RTPT, ATPT, MTA, TTC, RAda,
)  # fmt: skip

__all__ = [
    "ABPEM", "ATPT", "CTPT", "EATA", "MTA", "READ", "RTPT", "SAR", "TPT", "TTC", "BriMPR",
    "Episode", "Episodic", "Method", "Objective", "RAda", "Source", "Tent", "by_name", "names",
]  # fmt: skip


def names(family: str | None = None) -> list[str]:
    """Names that ``fasttta.adapt`` takes as ``method``: all, or those for the models of a family,
    ``"fusion"``, ``"vision-language"`` or ``"features"``."""
    return [method.name for method in _METHODS if family in (None, *method.families)]


def is_built_in(cls: type[Method]) -> bool:
    """Whether a class is found by its name alone."""
    return cls in _METHODS


def path_of(cls: type) -> str:
    """The import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def by_name(name: str) -> type[Method]:
    """The class of a method's name.

    Raises:
        ValueError: no such method.
    """
    for method in _METHODS:
        if method.name == name:
            return method
    raise ValueError(f"method={name!r} is unknown; known: {', '.join(map(repr, names()))}")
