"""The methods that have a name: those of fasttta, registered ones, and those of installed packages.

A package offers methods by entry points of the group ``fasttta.methods``, in its pyproject.toml:

    [project.entry-points."fasttta.methods"]
    mine = "my_package.methods:Mine"

The names of entry points are read from the metadata of packages, without importing one. A package
is imported when a method of its name is asked for, or when all names are listed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TypeVar, overload

from .abpem import ABPEM
from .atpt import ATPT
from .base import Method
from .brimpr import BriMPR
from .class_check import check_decorated, is_base
from .eata import EATA
from .mta import MTA
from .prompt_tuning import CTPT, RTPT, TPT
from .rada import RAda
from .read import READ
from .sar import SAR
from .source import Source
from .tent import Tent
from .ttc import TTC

GROUP = "fasttta.methods"  # of entry points
# a test compares them with the signature of adapt
_KEYWORDS = frozenset({
    "model", "method", "spec", "classes", "precision", "engine", "guard", "seed", "preset",
    "verify_model",
})  # fmt: skip

_BUILT_IN: tuple[type[Method], ...] = (
    Source, Tent, EATA, SAR, READ, ABPEM, BriMPR, TPT, CTPT, RTPT, ATPT, MTA, TTC, RAda,
)  # fmt: skip
_methods: dict[str, type[Method]] = {method.name: method for method in _BUILT_IN}
_warned: set[str] = set()  # entry points for which a warning was issued

M = TypeVar("M", bound=type[Method])


@overload
def register(cls: M) -> M: ...
@overload
def register(cls: None = None) -> Callable[[M], M]: ...
def register(cls: M | None = None) -> M | Callable[[M], M]:
    """Registers a method under its name, for ``adapt``, ``load``, ``names``, the command line, the
    demo, ``inspect`` and reports. A decorator, ``@fasttta.methods.register``.

    A class that is made again under its import path, as in a notebook, replaces the earlier one.

    Returns:
        The class itself.

    Raises:
        TypeError: it is not a class of a method, or a base that lacks parts, or an option has no
            default or the name of a keyword of ``adapt``.
        ValueError: another class has its name (the message has the import paths of both), or the
            name is ``"auto"``.
    """
    if cls is None:
        return register
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"register: needed a subclass of fasttta.methods.Method, found {cls!r:.80}")
    if not isinstance(getattr(cls, "name", None), str):
        raise TypeError(f"register: {cls.__name__} has no name; it is a base of methods")
    if is_base(cls):
        raise TypeError(f"register: {cls.__name__} is abstract; it is a base of methods")
    if cls.name == "auto":
        raise ValueError(
            f"register: the name of {cls.__name__} is 'auto', with which adapt chooses a method; "
            "give it another name"
        )
    check_decorated(cls)
    for option in fields(cls):
        if option.default is MISSING and option.default_factory is MISSING:
            raise TypeError(
                f"register: the option {option.name} of {cls.__name__} has no default; needed one, "
                f"so that adapt(model, {cls.name!r}) works"
            )
        if option.name in _KEYWORDS:
            raise TypeError(
                f"register: the option {option.name} of {cls.__name__} has the name of a keyword "
                f"of adapt, so adapt(model, {cls.name!r}, {option.name}=...) cannot reach it; "
                "needed another name"
            )
    if (other := _methods.get(cls.name)) is not None and path_of(other) != path_of(cls):
        raise ValueError(
            f"the name {cls.name!r} belongs to {path_of(other)} already, so {path_of(cls)} cannot "
            "have it; give one of them another name"
        )
    _methods[cls.name] = cls
    return cls


def path_of(cls: type) -> str:
    """The import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_registered(cls: type[Method]) -> bool:
    """Whether a method's name stands for this class."""
    return _methods.get(getattr(cls, "name", "")) is cls


def registered_at(name: str, path: str) -> type[Method] | None:
    """The class with this name and import path, if it is registered or an entry point names it."""
    if name not in _methods and name in _entry_points():
        _load(name)
    cls = _methods.get(name)
    return cls if cls is not None and path_of(cls) == path else None


def names(family: str | None = None) -> list[str]:
    """Names that ``fasttta.adapt`` takes as ``method``; imports packages with entry points.

    Args:
        family: only methods for its models: ``"fusion"``, ``"vision-language"`` or ``"features"``.
    """
    for name in _entry_points():
        _load(name)
    return [name for name, cls in _methods.items() if family in (None, *cls.families)]


def by_name(name: str) -> type[Method]:
    """The class of a method's name.

    Raises:
        ValueError: there is no such method, or its package cannot be imported.
    """
    if name not in _methods and name in _entry_points() and (problem := _load(name)):
        raise ValueError(f"method={name!r}: {problem}")
    if name not in _methods:
        raise ValueError(f"method={name!r} is unknown; known: {', '.join(map(repr, names()))}")
    return _methods[name]


@functools.cache
def _offered(path: tuple[str, ...]) -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Entry points of installed packages by name; ``path`` is sys.path, where they are found."""
    points: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        others = points.setdefault(point.name, [])
        if all(other.value != point.value for other in others):  # one package found twice
            others.append(point)
    return points


def _entry_points() -> dict[str, list[importlib.metadata.EntryPoint]]:
    return _offered(tuple(sys.path))


def _load(name: str) -> str | None:
    """Registers the method that an entry point names.

    Returns:
        Why that is not possible, which is also a warning, once a process; None: it is registered.
    """
    points = _entry_points()[name]
    texts = [f"{x.value} of {x.dist.name if x.dist else 'an unknown package'}" for x in points]
    if len(points) > 1:
        return _warn(name, f"two packages offer it: {' and '.join(texts)}; uninstall one")
    try:
        cls = points[0].load()
        if getattr(cls, "name", None) != name:
            raise TypeError(f"the class has the name {getattr(cls, 'name', None)!r}")
        register(cls)
    except (Exception, SystemExit) as error:  # the import of a package may raise anything
        return _warn(name, f"{texts[0]} cannot be used: {type(error).__name__}: {error}")
    return None


def _warn(name: str, problem: str) -> str:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"method {name!r}: {problem}", UserWarning, stacklevel=4)
    return problem
