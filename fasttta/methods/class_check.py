"""Checks that the class of a method is complete, when the class is made."""

from __future__ import annotations

import abc
import inspect
from typing import Any

_PARTS = {
    "name": 'the name that adapt and save know it by, for example name = "mine"',
    "group": 'what it tunes ("norm", "fusion_qkv", ...), or group = None',
    "frozen_encoder": "whether everything before fuse is frozen, frozen_encoder = True or False",
}

# what an episode updates -> the methods that it needs
_STRATEGIES = {
    "none": ("predict",),
    "prompt": ("objective", "predict"),
    "pixels": ("start", "objective", "move", "predict"),
}
_SIGNATURES = {
    "predict": "self, model, seen, state) -> Prediction",
    "objective": "self, model, features, *, state, constants, valid) -> Objective",
    "start": "self, images, seen) -> Tensor",
    "move": "self, seen, added, grad) -> Tensor",
}

# members that only methods of these bases are asked for
_OF_BASES = {
    "blank_state": "special_bases.StatefulMethod",
    "check_saved": "special_bases.StatefulMethod",
    "extend": "special_bases.ExtendingMethod",
    "draw": "special_bases.DrawingMethod",
    "single_sample": "base.WeightedMethod",
    "updates": "base.WeightedMethod (weights in place of updates)",
}

# groups of tuned tensors of which some lie in the encoders
_IN_ENCODERS = ("norm", "encoder_norm", "prompts")


def check_class(cls: type[Any], base: type[Any], abstract: bool = False) -> None:
    """Checks that a subclass of a base of methods is complete, unless it is a base itself: made
    with ``abstract=True``, with ``abc.ABC`` or with abstract methods.

    Raises:
        TypeError: a part is missing, or is of the wrong kind; says what to write.
    """
    if abstract:
        # dataclass(slots=True) makes a copy of the class, without the keyword
        cls._abstract = True  # type: ignore[attr-defined]
    if is_base(cls):
        return
    for name, what in _PARTS.items():
        if not hasattr(cls, name):
            raise TypeError(f"{cls.__name__} lacks {name}: needed {what}")
    if not isinstance(cls.name, str) or not cls.name.strip():
        raise TypeError(f"{cls.__name__}.name is {cls.name!r}: needed {_PARTS['name']}")
    if cls.group is not None and not (isinstance(cls.group, str) and cls.group):
        raise TypeError(f"{cls.__name__}.group is {cls.group!r}: needed {_PARTS['group']}")
    if not isinstance(cls.frozen_encoder, bool):
        raise TypeError(
            f"{cls.__name__}.frozen_encoder is {cls.frozen_encoder!r}: needed True or False"
        )
    if cls.frozen_encoder and cls.group in _IN_ENCODERS and cls.tuned is base.tuned:
        raise TypeError(
            f"{cls.__name__} tunes {cls.group!r}, which lies in the encoders, and has "
            "frozen_encoder = True: these tensors would get no gradient; needed "
            "frozen_encoder = False"
        )
    families = cls.families
    if not (
        isinstance(families, (tuple, list))
        and families
        and all(isinstance(x, str) for x in families)
    ):
        raise TypeError(
            f"{cls.__name__}.families is {families!r}: needed a tuple of the kinds of models that "
            'it adapts, for example ("fusion",)'
        )
    bases = {base.__name__ for base in cls.__mro__}
    for name, asked in _OF_BASES.items():
        if name in vars(cls) and asked.partition(" ")[0].split(".")[1] not in bases:
            raise TypeError(
                f"{cls.__name__} defines {name}, which only some methods are asked for: needed the "
                f"base fasttta.methods.{asked}"
            )
    if cls.group is not None and not _declared(cls, "lr"):
        raise TypeError(
            f"{cls.__name__} tunes {cls.group} and lacks lr: needed its learning rate, for example "
            "lr: float = 1e-4"
        )
    _check_needed(cls)
    if cls.objective is base.objective and _of_steps(cls):
        raise TypeError(
            f"{cls.__name__} lacks objective: needed a method that turns features into losses, "
            "def objective(self, model, features, *, state, constants, valid) -> Objective"
        )


def is_base(cls: type) -> bool:
    """Whether a class is a base of methods: abstract, so that it has no objects."""
    return (
        "_abstract" in vars(cls)
        or abc.ABC in cls.__bases__
        or any(
            getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls)
        )
    )


def _check_needed(cls: Any) -> None:
    for base in cls.__mro__[1:]:
        for name in vars(base).get("NEEDED", ()):
            if getattr(cls, name) is getattr(base, name):
                raise TypeError(
                    f"{cls.__name__} lacks {name}: needed from a subclass of {base.__name__}"
                )


def check_episodes(cls: Any, base: Any) -> None:
    """Checks that a subclass of the base of episodes runs them.

    Raises:
        TypeError: a part is missing.
    """
    if is_base(cls):
        return
    if cls.strategy not in _STRATEGIES:
        raise TypeError(
            f"{cls.__name__}.strategy is {cls.strategy!r}: needed what an episode updates, "
            + ", ".join(map(repr, _STRATEGIES))
        )
    for name in _STRATEGIES[cls.strategy]:
        if getattr(cls, name) is getattr(base, name):
            raise TypeError(
                f"{cls.__name__} lacks {name}: needed for episodes of strategy {cls.strategy!r}, "
                f"def {name}({_SIGNATURES[name]}"
            )
    for name, example in (
        ("prompt", 'str = "a photo of a"'), ("prompt_length", "int | None = None"),
    ):  # fmt: skip
        if not _declared(cls, name):
            raise TypeError(f"{cls.__name__} lacks the option {name}: needed {name}: {example}")


def _declared(cls: type, name: str) -> bool:
    return hasattr(cls, name) or any(name in inspect.get_annotations(c) for c in cls.__mro__)


def _of_steps(cls: Any) -> bool:
    """Whether steps of fusion models would run it."""
    return any(family != "vision-language" for family in cls.families) or cls.group is not None


def check_decorated(cls: type) -> None:
    """Checks that the options that a class declares are fields of a dataclass.

    Raises:
        TypeError: the class lacks ``@dataclass``.
    """
    if "__dataclass_fields__" in vars(cls):
        return
    options = [
        name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)
    ]
    if options:
        raise TypeError(
            f"{cls.__name__} declares the options {', '.join(options)} and is no dataclass; needed "
            f"@dataclass(frozen=True) above class {cls.__name__}"
        )
