"""The options of a method: which values each may have, declared beside its type.

``alpha: Annotated[float, Share()] = 0.5`` declares a number from 0 to 1, and
``alpha: Annotated[float, Share()] | None = None`` one that may be None. ``Method.__post_init__``
checks all options that are declared so.
"""

from __future__ import annotations

import inspect
import math
import sys
import types
import weakref
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, NamedTuple, Protocol, Union, get_args, get_origin

_MOST_COUNT = 10**6  # largest integer option
_MOST_NUMBER = 2.0**63  # largest number option: sums and products of a few stay finite in float32


class Rule(Protocol):
    """Which values an option may have. Any object with this method can stand in ``Annotated``."""

    def needed(self, value: Any, kind: type) -> str | None:
        """What is needed in place of ``value``, for the error; None: the value is allowed.

        Args:
            kind: the annotated type, ``int``, ``float``, ``str`` or another.
        """


class Range:
    """A finite number in a range; for an ``int`` option an integer. ``True`` is no number.

    Args:
        at_least, above: the lower bound, included or not.
        at_most, below: the upper bound, included or not. Without one the largest number is 2**63,
            the largest integer a million.
    """

    def __init__(
        self,
        *,
        at_least: float | None = None,
        above: float | None = None,
        at_most: float | None = None,
        below: float | None = None,
    ) -> None:
        self.at_least, self.above, self.at_most, self.below = at_least, above, at_most, below

    def needed(self, value: Any, kind: type) -> str | None:
        """As ``Rule.needed``."""
        of = int if kind is int else (int, float)
        number = isinstance(value, of) and not isinstance(value, bool)
        # compared, not converted: math.isfinite raises OverflowError for a large integer
        if not number or not -math.inf < value < math.inf or not self._holds(value):
            return self.text(kind)
        most = _MOST_COUNT if kind is int else _MOST_NUMBER
        if abs(value) > most:
            noun = "an integer" if kind is int else "a number"
            return f"{noun} of at most {most if kind is int else format(most, 'g')}"
        return None

    def _holds(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def text(self, kind: type) -> str:
        """The range in words."""
        bounds = (
            ("of at least", self.at_least), ("above", self.above), ("at most", self.at_most),
            ("below", self.below),
        )  # fmt: skip
        words = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
        if words and words[0].startswith("at most"):
            words[0] = f"of {words[0]}"
        return " ".join(
            ["an integer" if kind is int else "a finite number", " and ".join(words)]
        ).strip()


class _Capped(Range):
    """A range whose upper bound is only a safeguard, which errors name where it is exceeded."""

    def __init__(self, most: float | None, **bounds: float) -> None:
        super().__init__(**bounds)
        self.most = most

    def needed(self, value: Any, kind: type) -> str | None:
        """As ``Rule.needed``."""
        of = int if kind is int else (int, float)
        number = isinstance(value, of) and not isinstance(value, bool)
        if number and self.most is not None and self.most < value < math.inf:
            noun = "an integer" if kind is int else "a number"
            return f"{noun} of at most {self.most:g}"
        return super().needed(value, kind)


class Finite(_Capped):
    """Any finite number, at most ``most``."""

    def __init__(self, most: float | None = None) -> None:
        super().__init__(most)


class Positive(_Capped):
    """A finite number above 0, at most ``most``."""

    def __init__(self, most: float | None = None) -> None:
        super().__init__(most, above=0)


class AtLeast(_Capped):
    """A finite number (of an ``int`` option an integer) of at least ``low``, at most ``most``."""

    def __init__(self, low: float, most: float | None = None) -> None:
        super().__init__(most, at_least=low)


class Share(Range):
    """A number from 0 to 1; with ``positive=True`` above 0."""

    def __init__(self, positive: bool = False) -> None:
        super().__init__(**{"above" if positive else "at_least": 0}, at_most=1)

    def text(self, kind: type) -> str:
        """The range in words."""
        return "a number from 0 to 1" if self.above is None else "a share above 0 and at most 1"


class OneOf:
    """One of these values."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def needed(self, value: Any, kind: type) -> str | None:
        """As ``Rule.needed``."""
        if any(type(value) is type(allowed) and value == allowed for allowed in self.values):
            return None
        return " or ".join(map(repr, self.values))


class _Flag(OneOf):
    def __init__(self) -> None:
        super().__init__(True, False)


#: True or False, nothing that merely counts as one of them
Flag = Annotated[bool, _Flag()]


class Declared(NamedTuple):
    """What is declared of an option."""

    kind: type
    rule: Rule
    optional: bool  # whether None is allowed, too


_read: weakref.WeakKeyDictionary[type, Mapping[str, Declared]] = weakref.WeakKeyDictionary()


def declared(cls: type) -> Mapping[str, Declared]:
    """The declared options of a class and its bases, by name. An option that a subclass declares
    again without a rule keeps the rule of its base."""
    if cls in _read:
        return _read[cls]
    rules: dict[str, Declared] = {}
    for owner in reversed(cls.__mro__):
        for name, annotation in inspect.get_annotations(owner).items():
            if isinstance(annotation, str):
                if "Annotated" not in annotation and annotation != "Flag":
                    continue
                annotation = _evaluated(annotation, owner, name)
            if (rule := _rule_of(annotation)) is not None:
                rules[name] = rule
    _read[cls] = rules
    return rules


def _evaluated(annotation: str, owner: type, name: str) -> Any:
    """The object that the text of an annotation stands for, in the module of its class."""
    module = sys.modules.get(owner.__module__)
    # a class that exec made has no module: the functions in it know their names
    functions = (x.__globals__ for x in vars(owner).values() if isinstance(x, types.FunctionType))
    error: Exception | None = None
    for names in (vars(module) if module else {}, *functions):
        try:
            return eval(annotation, dict(names), dict(vars(owner)))
        except Exception as failure:  # evaluating the text may raise anything
            error = failure
    raise TypeError(
        f"{owner.__name__}.{name}: its type {annotation!r} cannot be read: {error}; needed names "
        "that its module defines"
    )


def _rule_of(annotation: Any) -> Declared | None:
    optional = False
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        optional = len(parts) < len(get_args(annotation))
        annotation = parts[0] if len(parts) == 1 else None
    if get_origin(annotation) is not Annotated:
        return None
    kind, *notes = get_args(annotation)
    rules = [note for note in notes if hasattr(note, "needed")]
    return Declared(kind, rules[0], optional) if rules else None


def option_names(cls: Any) -> list[str]:
    """The names of a method's options, those of its bases first."""
    return [option.name for option in fields(cls)]


def check_options(method: Any) -> None:
    """Checks the declared options of a method object.

    Raises:
        ValueError: one has a value that is not allowed; says which, the value, and what is needed.
    """
    for name, option in declared(type(method)).items():
        value = getattr(method, name)
        if value is not None or not option.optional:
            check_option(name, value, option.rule, option.kind)


def check_option(name: str, value: Any, rule: Rule, kind: type = float) -> None:
    """Checks one value by a rule.

    Raises:
        ValueError: the value is not allowed.
    """
    if (needed := rule.needed(value, kind)) is not None:
        require(False, name, value, needed)


def require(condition: bool, name: str, value: Any, needed: str) -> None:
    """Raises ValueError, naming the option, its value and what is needed, unless ``condition``."""
    if not condition:
        raise ValueError(f"{name}={value!r:.80}: needed {needed}")


class DefaultInt(int):
    """The default of an option that is reduced where it does not fit the model; an int that a
    caller writes is an error there."""
