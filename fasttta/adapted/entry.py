"""From a user's model to one that adapts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .. import __version__, methods
from ..engine import delta
from ..engine import folder as saves
from ..engine.precision import resolve
from ..engine.shift import Guard, ShiftDetector
from ..engine.step import warn
from ..families.cavmae import recognise
from ..families.clip import recognise_clip
from ..methods.base import Method
from ..methods.episodic import Episodic
from ..models import RationalCLIP
from ..models.specified.spec import ModelSpec
from ..source_stats import SourceStats
from .fusion import Adapted
from .head import AdaptedHead
from .images import AdaptedCLIP

_ENGINES = ("auto", "eager", "graph")

# names that make an AdaptedCLIP of a CLIP; a name that is no literal may also be "rada"
_OfImages = Literal["auto", "source", "tpt", "c-tpt", "r-tpt", "a-tpt", "mta", "ttc"]


@overload
def adapt(
    model: RationalCLIP,
    method: Literal["auto", "rada"] | methods.RAda = "auto",
    *,
    precision: str = "auto",
    engine: str = "auto",
    guard: ShiftDetector | None = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> AdaptedHead: ...
@overload
def adapt(
    model: nn.Module,
    method: Literal["rada"] | methods.RAda,
    *,
    classes: Sequence[str] | Tensor,
    precision: str = "auto",
    engine: str = "auto",
    guard: ShiftDetector | None = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> AdaptedHead: ...
@overload
def adapt(
    model: nn.Module,
    method: _OfImages | methods.Source | Episodic = "auto",
    *,
    classes: Sequence[str] | Tensor,
    precision: str = "auto",
    engine: str = "auto",
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> AdaptedCLIP: ...
@overload
def adapt(
    model: nn.Module,
    method: str | Method,
    *,
    classes: Sequence[str] | Tensor,
    precision: str = "auto",
    engine: str = "auto",
    guard: ShiftDetector | None = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> AdaptedCLIP | AdaptedHead: ...
@overload
def adapt(
    model: nn.Module,
    method: str | Method = "auto",
    *,
    spec: ModelSpec | None = None,
    classes: None = None,
    precision: str = "auto",
    engine: str = "auto",
    guard: ShiftDetector | None = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> Adapted: ...
def adapt(
    model: nn.Module,
    method: str | Method = "auto",
    *,
    spec: ModelSpec | None = None,
    classes: object = None,
    precision: str = "auto",
    engine: str = "auto",
    guard: object = None,
    seed: int = 0,
    preset: str | None = None,
    verify_model: str = "first",
    **options: object,
) -> Adapted:
    """Makes a model adapt, label-free, to what it is called on.

    Args:
        model: a ``fasttta.models`` model, or a module of the official CAV-MAE's structure (CAV-MAE,
            READ, ABPEM or BriMPR code; in DataParallel, DDP or torch.compile or not), which is
            compared with its own forward on the first batch; or any fusion transformer with a
            ``spec``; or a CLIP (``fasttta.models.CLIP``, Hugging Face's, open_clip's, OpenAI's).
            It is never modified: frozen weights are shared, tuned tensors are private
            copies.
        method: a name (``fasttta.methods.names()``), a method object, or ``"auto"``: ``"abpem"``
            for two-modality fusion models, ``"a-tpt"`` for CLIP.
        precision: ``"fp64"``, ``"fp32"``, ``"tf32"``, ``"bf16"``, or ``"auto"``: a float64 model
            stays in float64, else bf16 on GPUs that have it, else fp32. Tuned tensors are fp32
            (fp64 under ``"fp64"``); fp32 means IEEE fp32.
        engine: ``"graph"``: steps captured as CUDA graphs, one replay a step; needs a GPU.
            ``"eager"``; ``"auto"``: eager.
        spec: ``ModelSpec`` of a model that is no CAV-MAE; also compared on the first batch.
        classes: for CLIP: class names, or token ids [C, L] (int64).
        guard: ``fasttta.ShiftDetector(...)``: behind a batch that shows a shift, adaptation begins
            anew from what ``adapt`` made, not from what ``load_tuned`` set. It is not used itself,
            only its settings are.
        seed: of the random state.
        verify_model: whether the wrapped model is still what it was, asked at every call; an error
            names what changed. ``"first"``: by what PyTorch counts (versions, storages,
            identities of tensors, hooks, classes): sees ``load_state_dict``, optimiser steps,
            replaced tensors and layers, in about 0.3 ms, not writes through ``.data`` or numpy.
            ``"always"``: also reads all weights and buffers, exactly. ``"never"``: not at all.
            (Moving it to another device or type, loading the same weights again, ``train()`` and
            ``eval()`` change nothing.)
        preset: name of published settings of the method, ``methods.ABPEM.preset(name)``; options
            that are given besides count in place of the preset's.
        options: of the method; ``adapt(m, "abpem", k=8)`` is ``adapt(m, methods.ABPEM(k=8))``.
            Besides, what a method takes from source data: ``source_stats`` (``SourceStats``, for
            BriMPR and ``ABPEM(anchor="source")``), ``fisher`` (of ``collect_fisher``, for EATA);
            for class names ``tokenizer``: a callable, or the path of CLIP's merges file.

    Raises:
        TypeError: not a model that fasttta knows, or an option that the method does not have.
        ValueError: an unknown name or a value out of range.
    """
    clip = recognise_clip(model) if spec is None else None
    rational = spec is None and isinstance(model, RationalCLIP)
    if classes is not None and not (clip or rational):
        raise ValueError(f"classes={classes!r:.80}: {_without_classes(model, spec)}")
    if classes is not None and rational:
        raise ValueError("classes: this model has its own; adapt its .model for others")
    if guard is not None and not isinstance(guard, ShiftDetector):
        raise TypeError(f"guard must be a fasttta.ShiftDetector, found {guard!r:.80}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int, found {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is out of range, needed 0 to 2**63 - 1")
    if method == "auto" and (clip or rational):
        method = "rada" if rational else "a-tpt"
    chosen, resources = _method(method, options, preset)
    guard = None if guard is None else Guard(guard)
    if clip or (rational and isinstance(chosen, methods.RAda)):
        adapted = _adapted_clip(
            model, clip, chosen, precision, engine, int(seed), classes, resources, guard,
            verify_model,
        )  # fmt: skip
        _warn_of_ranks(model)
        return adapted
    known = recognise(model, spec)
    _check_origin(resources.get("source_stats"), known.fusion)
    parameter = next(known.fusion.parameters())
    adapted = Adapted(
        model,
        known,
        chosen,
        resolve(precision, parameter.device, parameter.dtype),
        engine=_engine(engine, parameter.device),
        seed=int(seed),
        constants=chosen.constants(known.fusion, resources),
        guard=guard,
        verify_model=verify_model,
    )
    adapted._spec = spec
    _warn_of_ranks(model)
    return adapted


def _without_classes(model: nn.Module, spec: ModelSpec | None) -> str:
    """Why a model takes no classes: what it was recognised as, or that it is unknown."""
    try:
        family = recognise(model, spec).family
    except TypeError as error:
        return f"they are for CLIP, and {error}"
    return f"recognised as {family}; models of this family take no classes"


def _warn_of_ranks(model: nn.Module) -> None:
    """Says that ranks are not kept together, where it looks as if they should be."""
    inner: object = model
    while isinstance(inner, nn.Module):
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            warn(
                "the model is in DistributedDataParallel: each rank adapts on its own batches, "
                "so that tuned tensors differ between ranks; of ranks that save into one folder "
                "the last save counts",
                UserWarning,
            )
            return
        # not ``or``: a compiled module has a length only if the one within has
        inner = inner._modules.get("module", inner._modules.get("_orig_mod"))


def _method(
    method: str | Method, options: dict[str, Any], preset: str | None = None
) -> tuple[Method, dict[str, Any]]:
    """The method object, and those options that are tensors from source data."""
    if not isinstance(method, (str, Method)):
        hint = f"; give an object of it: {method.__name__}(...)" if isinstance(method, type) else ""
        raise TypeError(f"method must be a name or a method object, found {method!r:.80}{hint}")
    if isinstance(method, str):
        cls = methods.by_name("abpem" if method == "auto" else method)
    else:
        cls = type(method)
    resources = {name: value for name, value in options.items() if name in cls.RESOURCES}
    options = {name: value for name, value in options.items() if name not in resources}
    if isinstance(method, Method):
        if preset is not None:
            raise TypeError(
                f"preset={preset!r}: a method object has its settings; needed a name with it, or "
                f"{cls.__name__}.preset({preset!r})"
            )
        if options:
            raise TypeError(
                f"{', '.join(options)}: options are given to the method object itself, "
                f"{cls.__name__}(...)"
            )
        return method, resources
    unknown = [name for name in options if name not in cls.option_names()]
    if unknown:
        raise TypeError(
            f"{cls.__name__} has no option {', '.join(unknown)}; known: "
            f"{', '.join((*cls.option_names(), *cls.RESOURCES))}"
        )
    if preset is not None:
        cls.preset(preset)  # an error for an unknown one
        options = {**cls.PRESETS[preset], **options}
    return cls(**options), resources


def _adapted_clip(
    model, clip, method, precision, engine, seed, classes, resources, guard=None,
    verify_model="first",
) -> Adapted:  # fmt: skip
    """A CLIP (``clip`` None: a RationalCLIP) with a method for images."""
    parameter = (model.model if clip is None else clip.clip).positional_embedding
    options = {"engine": _engine(engine, parameter.device), "seed": seed, "classes": classes,
               "verify_model": verify_model}  # fmt: skip
    precision = resolve(precision, parameter.device, parameter.dtype)
    if isinstance(method, methods.RAda):
        return AdaptedHead(
            model, clip, method, precision, **options, resources=resources, guard=guard
        )
    if guard is not None:
        raise ValueError(
            f"guard: {method.name!r} begins every image anew, so that there is nothing to reset"
        )
    return AdaptedCLIP(model, clip, method, precision, **options, resources=resources)


def _check_origin(source_stats: object, fusion: nn.Module) -> None:
    """Raises ValueError if source statistics say that they are of other weights."""
    if isinstance(source_stats, SourceStats) and source_stats.model is not None:
        found = delta.model_digest(fusion)
        if found != source_stats.model:
            raise ValueError(
                f"source_stats are of another model: weights {source_stats.model}, this one's are "
                f"{found}; collect them anew, or, if you know that they fit, pass "
                "dataclasses.replace(source_stats, model=None)"
            )


def _engine(engine: str, device: torch.device) -> str:
    if engine not in _ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; known: {', '.join(map(repr, _ENGINES))}")
    if engine != "graph":
        return "eager"
    if device.type != "cuda":
        found = f"the model is on {device}"
        if not torch.cuda.is_available():
            found = "CUDA is not available"
        raise ValueError(f'engine="graph" needs a model on a GPU, {found}; use engine="eager"')
    return "graph"


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    engine: str = "auto",
    method: type[Method] | None = None,
) -> Adapted:
    """Goes on where ``Adapted.save(folder)`` stopped: the state is bit-identical. No code is
    imported or run because of what the files say.

    Args:
        model: the model that the state was saved for.
        folder: where it was saved.
        spec, engine: as in ``adapt``.
        method: the class of the method, where that is not one of ``fasttta.methods``.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: the files are damaged or of another model; names the file and the field.
        TypeError: ``method`` is no class of a method; not a model that fasttta knows.
    """
    if method is not None and not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"method must be a subclass of fasttta.methods.Method, found {method!r}")
    record, tensors = saves.read(folder)
    file = Path(folder) / saves.RECORD
    with saves.naming(file):
        chosen = _recorded_method(record, folder, method)
    adapted = _restored(model, spec, chosen, engine, record, tensors, file)
    _warn_of_ranks(model)
    return adapted


def _recorded_method(
    record: Mapping[str, Any], folder: str | os.PathLike[str], cls: type[Method] | None
) -> Method:
    """The method of a record, of a class that is passed or built in."""
    if cls is None and "class" in record:
        short = record["class"].rpartition(".")[2]
        raise ValueError(
            f"class: the method is {record['class']}, which load does not import; pass the class: "
            f"fasttta.load(model, {os.fspath(folder)!r}, method={record['class']}) "
            f"after importing {short}"
        )
    if cls is None:
        cls = methods.by_name(record["method"])
    if cls.name != record["method"]:
        raise ValueError(
            f"method: it was saved with {record['method']!r}, method={cls.__name__} is {cls.name!r}"
        )
    missing = [name for name in cls.option_names() if name not in record["options"]]
    if missing and record["fasttta"] == __version__:  # another version may know fewer
        raise ValueError(f"options.{missing[0]} is missing")
    try:
        return cls(**{name: _tuples(value) for name, value in record["options"].items()})
    except Exception as error:  # whatever a method's own checks raise
        raise ValueError(f"options: {error}") from error


def _tuples(value: Any) -> Any:
    """An option as a method had it: JSON has lists only, and frozen options no lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _restored(
    model: nn.Module,
    spec: ModelSpec | None,
    method: Method,
    engine: str,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: object,
    verify_model: str = "first",
) -> Adapted:
    """An adapted model with the state of a record; what is wrong with it is said of ``where``."""
    clip = recognise_clip(model) if spec is None else None
    rational = spec is None and isinstance(model, RationalCLIP)
    adapted: Adapted
    if clip or (rational and isinstance(method, methods.RAda)):
        with saves.naming(where):
            if (clip is None) == ("classes" in tensors):
                raise ValueError(f"the state was saved for another model: it is of {method.name!r}")
            adapted = _adapted_clip(
                model, clip, method, record["precision"], engine, record["seed"],
                tensors.get("classes"), {}, _recorded_guard(record), verify_model,
            )  # fmt: skip
    else:
        known = recognise(model, spec)
        parameter = next(known.fusion.parameters())
        engine = _engine(engine, parameter.device)
        with saves.naming(where):
            adapted = Adapted(
                model,
                known,
                method,
                resolve(record["precision"], parameter.device, parameter.dtype),
                engine=engine,
                seed=record["seed"],
                constants={
                    name.removeprefix("constant."): x
                    for name, x in tensors.items()
                    if name.startswith("constant.")
                },
                guard=_recorded_guard(record),
                verify_model=verify_model,
            )
    adapted._spec = spec
    with saves.naming(where):
        state = adapted._state_of(record, tensors)
    adapted._publish(state)
    return adapted


def _recorded_guard(record: Mapping[str, Any]) -> Guard | None:
    return Guard.of(record["guard"]) if "guard" in record else None


def unpickled(
    model: nn.Module,
    spec: ModelSpec | None,
    method: Method,
    engine: str,
    record: dict[str, Any],
    tensors: dict[str, Tensor],
) -> Adapted:
    """What an adapted model is pickled as."""
    record, training = dict(record), record["training"]
    mode = record.pop("verify_model")
    adapted = _restored(model, spec, method, engine, record, tensors, "the pickled model", mode)
    return adapted.train(training)
