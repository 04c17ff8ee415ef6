"""The model that ``package.module:name`` names: a module, or what a function or class builds."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .console import UserCodeError

_NEEDED = "needed a torch.nn.Module, or a function or class without arguments that makes one"


def imported_model(name: str) -> nn.Module:
    """Imports ``package.module:name``, also from the current folder, and calls it unless it is a
    module.

    Only what can build a model is called: built-in functions and classes that are no
    ``torch.nn.Module`` are refused, and so is what needs arguments.

    Raises:
        ValueError: there is no such module or name, it makes no model, or its code fails.
    """
    where, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in where.split(".")):
        raise ValueError(f"MODEL={name!r}: needed a checkpoint file or package.module:name")
    with _this_folder_first():
        value = _attribute(name, where, attribute)
        model = value if isinstance(value, nn.Module) else _built(name, value)
    if not isinstance(model, nn.Module):
        raise ValueError(f"MODEL={name!r} makes {type(model).__name__}; {_NEEDED}")
    return model


@contextlib.contextmanager
def _this_folder_first() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code has removed it
            sys.path.remove(folder)


def _attribute(name: str, where: str, attribute: str) -> Any:
    try:
        value = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{where}.".startswith(f"{error.name}."):
            raise ValueError(
                f"MODEL={name!r}: {error}; needed a checkpoint file or package.module:name"
            ) from error
        raise _failure(name, f"importing {where}", error) from error
    except (Exception, SystemExit) as error:
        raise _failure(name, f"importing {where}", error) from error
    try:
        for part in attribute.split("."):
            value = getattr(value, part)
    except AttributeError as error:
        raise ValueError(
            f"MODEL={name!r}: {error}; needed a checkpoint file or package.module:name"
        ) from error
    return value


def _built(name: str, value: Any) -> Any:
    """What a function or class makes, without arguments."""
    if not callable(value):
        raise ValueError(f"MODEL={name!r} is {type(value).__name__}; {_NEEDED}")
    if isinstance(value, type) and not issubclass(value, nn.Module):
        raise ValueError(f"MODEL={name!r} is a class of other objects; {_NEEDED}")
    if inspect.isbuiltin(value):
        raise ValueError(f"MODEL={name!r} is a built-in function, which is not called; {_NEEDED}")
    missing = _arguments(value)
    if missing:
        raise ValueError(
            f"MODEL={name!r} needs arguments ({', '.join(missing)}); name a function that takes "
            "none and returns the model"
        )
    try:
        return value()
    except (Exception, SystemExit) as error:
        raise _failure(name, "building the model", error) from error


def _arguments(value: Callable) -> list[str]:
    """Names of the arguments that a call must give."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # Python cannot tell them
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        p.name
        for p in parameters
        if p.default is inspect.Parameter.empty and p.kind not in optional
    ]


def _failure(name: str, action: str, error: BaseException) -> UserCodeError:
    reason = f"{type(error).__name__}: {error}".split("\n")[0]
    return UserCodeError(f"MODEL={name!r}: {action} failed with {reason}")
