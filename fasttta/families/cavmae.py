"""Which family a user's model belongs to, by its structure, never by importing its code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MethodType, SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..engine.precision import Precision, environment
from ..models import CAVMAE
from ..models.cavmae.checkpoint import SPLIT_QKV
from ..models.copies import Tree, own_buffers, structural_copy, without_checkpointing
from ..models.rational.head import FeatureClassifier
from ..models.specified.model import SpecifiedModel
from ..models.specified.nested import rebuilt
from ..models.specified.spec import ModelSpec
from ..protocols import FusionModel
from .self_check import (
    altered,
    check_gradients,
    check_returned,
    gradients_of,
    hook_advice,
    refuse_wrapper_hooks,
)
from .weights import refuse_unusable
from .wrapped import adapters_hint, refuse_wrapped_layers

_CAVMAE_PARTS = (
    "patch_embed_a", "patch_embed_v", "pos_embed_a", "pos_embed_v", "modality_a", "modality_v",
    "blocks_a", "blocks_v", "blocks_u", "norm",
)  # fmt: skip
# what modules of the same structure call their projections: CAV-MAE, READ and BriMPR, ABPEM
_FLAVOURS = {
    (): "CAV-MAE",
    ("k", "q", "v"): "CAV-MAE as READ and BriMPR have it",
    ("ka", "kv", "qa", "qv", "va", "vv"): "CAV-MAE as ABPEM has it",
}


@dataclass
class Recognised:
    """A user's module as methods see it.

    Attributes:
        family: its name, for messages.
        fusion: the model that fasttta runs; shares the module's weights.
        prefix: where it lies in the user's module (``"module."``).
        split: names of separate copies of the q, k, v projections that the module keeps.
        module: the part that was recognised, to be compared with on the first batch; None if it
            is ``fusion`` itself, without hooks.
        structure: ``fusion`` as it was when a model was adapted, with buffers of its own; None: as
            it is now.
        tuned: names of the parameters of ``fusion`` that the method tunes, whose gradients are
            compared too; all_used: the logits must depend on each of them.
    """

    family: str
    fusion: FusionModel
    prefix: str = ""
    split: tuple[str, ...] = ()
    module: nn.Module | None = field(default=None, repr=False)
    structure: nn.Module | None = field(default=None, repr=False)
    tuned: frozenset[str] = frozenset()
    all_used: bool = False

    def verify(self, inputs: tuple[Tensor, ...]) -> bool:
        """Compares with the module's own forward, in float64 on a copy of its structure, for the
        first samples of a batch: logits, and gradients of what is tuned. (READ's and ABPEM's code
        changes its weights' storage on the first forward: the module itself is not run.)

        Returns:
            Whether it could be told: not from non-finite input.

        Raises:
            ValueError: the two differ by more than 1e-6 of the largest logit or gradient, or its
                forward fails: the module computes something else than its structure says.
        """
        if self.module is None:
            return True
        inputs = tuple(x[:2].double() if x.is_floating_point() else x[:2] for x in inputs)
        if not all(torch.isfinite(x).all() for x in inputs):
            return False
        exact = Precision("fp64", torch.float64, torch.float64)
        with environment(inputs[0].device, exact, grad=False):
            # one copy at a time is held
            model = _in_type(self._compared, torch.float64)
            ours, our_grads = self._graded(model, inputs, True)
            del model
            twin = structural_copy(self.module, _converted(torch.float64), hooks=True)
            own_buffers(twin, torch.float64)
            without_checkpointing(twin)
            own, own_grads = self._graded(twin, inputs, False)
            if not isinstance(own, Tensor) or own.shape != ours.shape:
                found = list(own.shape) if isinstance(own, Tensor) else type(own).__name__
                raise ValueError(
                    f"recognised as {self.family}, but its forward returns {found}, needed logits "
                    f"{list(ours.shape)} (or a tuple that begins with them)"
                )
            tolerance = 1e-6 * max(1.0, own.abs().max().item())
            error = (own.double() - ours).abs().max().item()
            if not error <= tolerance:
                raise ValueError(
                    f"recognised as {self.family}, but its own forward differs from that "
                    f"architecture's by {error:.1e}, needed at most {tolerance:.1e}: is its "
                    f"attention or forward patched?{hook_advice(self.module)}"
                )
            if self.tuned:
                check_gradients(f"recognised as {self.family}", sorted(self.tuned), own_grads,
                                our_grads, 1e-6, self.module, self.all_used)  # fmt: skip
        return True

    def keep_structure(self) -> None:
        """Has every later ``verify`` compare with what ``fusion`` is now: a user's module may get
        other classes and buffers, which what adapts does not have."""
        twin = structural_copy(self.fusion, lambda name, parameter: parameter)
        self.structure = cast(nn.Module, twin)
        own_buffers(self.structure, None)

    @property
    def _compared(self) -> Any:
        return self.fusion if self.structure is None else self.structure

    def compare_again(self) -> None:
        """Has the next ``verify`` compare: the module's hooks or classes are others by now."""
        if self.module is None:
            self.module = cast("nn.Module", self.fusion)

    def copied_parameters(self, model: nn.Module) -> dict[str, tuple[str, int]]:
        """Names of q, k and v that such a module copies from its packed projections itself, on its
        first forward, and the name and third of the packed one."""
        copied = {}
        for name, _ in model.named_parameters() if self.split else ():
            match = SPLIT_QKV.fullmatch(name.removeprefix(self.prefix))
            if match:
                packed = name.replace(f".{match[1]}.", ".qkv.")
                copied[name] = packed, "qkv".index(match[1][0])
        return copied

    def _graded(
        self, twin: nn.Module | FusionModel, inputs: tuple[Tensor, ...], cut: bool
    ) -> tuple[Any, list[Tensor | None]]:
        """Logits and gradients of the tuned tensors, through encode and fuse (``cut``) or through
        the module's own forward, which runs once: its hooks are the user's."""
        returned: list[Any] = []

        def run() -> Any:
            if cut:
                model = cast(FusionModel, twin)
                out: Any = model.fuse(model.encode(*inputs))
            else:
                out = self._own_logits(cast(nn.Module, twin), inputs)
            returned.append(out)
            return out

        if not self.tuned:
            return run(), []
        leaves = [
            [twin.get_parameter(x) for x in ([name] if cut else self._parts_of(name))]
            for name in sorted(self.tuned)
        ]
        flat = [leaf.requires_grad_(True) for parts in leaves for leaf in parts]
        with torch.enable_grad():
            grads = iter(gradients_of(run, flat))
        joined: list[Tensor | None] = []
        for parts in leaves:
            whole, *split = (next(grads) for _ in parts)
            if any(x is not None for x in split):  # computed with the copies of q, k and v
                rows = [torch.zeros_like(p) if x is None else x
                        for p, x in zip(parts[1:], split, strict=True)]  # fmt: skip
                whole = torch.cat(rows) + (0 if whole is None else whole)
            joined.append(whole)
        logits = returned[-1]
        return logits.detach() if isinstance(logits, Tensor) else logits, joined

    def _parts_of(self, name: str) -> list[str]:
        """A tuned parameter's name in the module, and those of its separate copies' rows."""
        parts = [name]
        if self.split and ".attn.qkv." in name and name.startswith("blocks_u."):
            parts += [name.replace(".qkv.", f".{x}.") for x in _used(list(self.split))]
        return [self._name_in_module(part) for part in parts]

    def _name_in_module(self, name: str) -> str:
        """The name, in the module that is compared, of one of the model's parameters."""
        return name

    def _own_logits(self, twin: nn.Module, inputs: tuple[Tensor, ...]) -> object:
        """What the module predicts. Modules with split projections compute with them in
        ``forward_eval`` (ABPEM's takes its script's arguments besides) and not in ``forward``."""
        name = "forward_eval" if self.split and hasattr(twin, "forward_eval") else "forward"
        parameters = inspect.signature(getattr(twin, name)).parameters.values()
        count = len([p for p in parameters if p.kind is not p.VAR_KEYWORD])
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            count = max(count, len(inputs) + 1)
        # hooks run around a call only
        call: Callable[..., Any] = twin if name == "forward" else getattr(twin, name)
        arguments = (*inputs, "multimodal", SimpleNamespace(use_cache=False))
        try:
            out = call(*arguments[: min(len(inputs) + 2, count)])
        except Exception as error:
            raise ValueError(
                f"recognised as {self.family}, but its {name}(audio, video, 'multimodal') fails: "
                f"{error}"
            ) from error
        return out[0] if isinstance(out, (tuple, list)) else out

    def merge_into(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Writes an adapted parameter into a copy of the user's module, split copies included."""
        module.get_parameter(self.prefix + name).copy_(value)
        if ".attn.qkv." in name and name.startswith("blocks_u."):
            for which in self.split:
                row = "qkv".index(which[0])
                part = value.chunk(3)[row]
                split = self.prefix + name.replace(".qkv.", f".{which}.")
                module.get_parameter(split).copy_(part)

    def merges(self, names: Iterable[str]) -> bool:
        """Whether the user's module has a place for what a method added to the model."""
        return False


@dataclass
class Prompted(Recognised):
    """A CAV-MAE in BriMPR's PromptVA, which holds prompts for its encoders.

    Attributes:
        holder: where the PromptVA lies in the user's module (``"module."``).
        tuned_prompts: they were tuned, so that predictions are those of its ``prompt=True``.
    """

    holder: str = ""
    tuned_prompts: bool = False

    _NAMES: ClassVar[dict[str, str]] = {"prompts.audio": "prompts_a", "prompts.video": "prompts_v"}

    def _name_in_module(self, name: str) -> str:
        return f"va_model.{name}" if self.tuned_prompts else name

    def _own_logits(self, twin: nn.Module, inputs: tuple[Tensor, ...]) -> object:
        if not self.tuned_prompts:
            return super()._own_logits(twin, inputs)
        audio, video = inputs
        try:
            out = twin(a=audio, v=video, mode="multimodal", prompt=True)
        except Exception as error:
            raise ValueError(
                f"recognised as {self.family} with tuned prompts, but its forward(a=, v=, "
                f"mode='multimodal', prompt=True) fails: {error}"
            ) from error
        return out[0] if isinstance(out, (tuple, list)) else out

    def merges(self, names: Iterable[str]) -> bool:
        return all(name in self._NAMES for name in names)

    def merge_into(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Also prompts, whatever their count, into a copy of the PromptVA."""
        if name not in self._NAMES:
            super().merge_into(module, name, value)
            return
        holder = module.get_submodule(self.holder.rstrip(".")) if self.holder else module
        theirs = getattr(holder, self._NAMES[name])
        like = cast(CAVMAE, self.fusion).norm.weight if theirs is None else theirs
        wanted = value.detach().to(like)
        setattr(holder, self._NAMES[name], nn.Parameter(wanted.clone()))
        setattr(holder, f"num_{self._NAMES[name]}", value.shape[1])


def _with_prompts(known: Recognised, holder: nn.Module, prefix: str) -> Recognised:
    """A CAV-MAE with the prompts of the PromptVA that holds it."""
    prompts = {
        name: x.detach()
        for name, attribute in (("audio", "prompts_a"), ("video", "prompts_v"))
        if (x := getattr(holder, attribute)) is not None
    }
    fusion = known.fusion
    assert isinstance(fusion, CAVMAE)
    with torch.inference_mode(False):
        if known.module is None:  # the user's own object is never changed
            fusion = structural_copy(fusion, lambda name, parameter: parameter)
        fusion.take_prompts({n: x.clone() if x.is_inference() else x for n, x in prompts.items()})
    tuned = fusion.tuned_prompts
    return Prompted(
        known.family, fusion, known.prefix, known.split, holder if tuned else known.module,
        holder=prefix, tuned_prompts=tuned,
    )  # fmt: skip


class Specified(Recognised):
    """A user's module under a ModelSpec."""

    fusion: SpecifiedModel

    def verify(self, inputs: tuple[Tensor, ...]) -> bool:
        """Learns from two samples of the first batch how the module runs, and compares encode and
        fuse, sample by sample, with its own forward, in float64 on a copy of its structure.

        Returns, Raises: as ``Recognised.verify``.
        """
        two = tuple(torch.cat((x, x)) if len(x) == 1 else x[:2] for x in inputs)
        if not all(torch.isfinite(x).all() for x in two):
            return False
        try:
            self._compare(two, torch.float64, 1e-6)
        except RuntimeError as error:  # a forward that sets types itself
            if "dtype" not in str(error) and "type" not in str(error):
                raise
            self._compare(two, torch.float32, 1e-4)
        return True

    def _compare(self, two: tuple[Tensor, ...], dtype: torch.dtype, tolerance: float) -> None:
        two = tuple(x.to(dtype) if x.is_floating_point() else x for x in two)
        exact, module = Precision("exact", dtype, dtype), self.module
        assert module is not None  # it is not its own fusion model
        kind = f"{type(module).__name__} cut as its ModelSpec says"
        with environment(two[0].device, exact, grad=False):
            twin = _in_type(self._compared, dtype)
            # with the module's hooks, which its own calls run and ours do not
            hooked = structural_copy(module, _converted(dtype), hooks=True)
            own_buffers(hooked, dtype)
            without_checkpointing(hooked)
            output, own_grads = self._own(twin, hooked, two)
            own = twin.own_logits(output).detach()
            twin.own_logits(twin.learn(two, check=dtype == torch.float64))
            tokens = [twin.encode(*(x[i : i + 1] for x in two)) for i in (0, 1)]
            alone = torch.cat([twin.fuse(x) for x in tokens])
            twin.outputs = []
            together = twin.fuse(torch.cat(tokens))
            returned = twin.returned(together, 0)
        limit = tolerance * max(1.0, own.abs().max().item())
        error = max(
            (own - x).abs().max().item() if own.shape == x.shape else float("inf")
            for x in (alone, together)
        )
        if not error <= limit:
            raise ValueError(
                f"{kind} differs from its own forward by {error:.1e}, needed at most {limit:.1e}: "
                "is there something random or stateful in its forward, does it mix the samples of "
                "a batch, or do forward hooks change results? ModelSpec(..., encode=(encode, "
                f"fuse)) gives the cut as two functions.{hook_advice(module)}"
            )
        check_returned(kind, output, returned, tolerance)
        if self.tuned:
            twin.outputs = None
            names = sorted(self.tuned)
            leaves = [twin.get_parameter(name).requires_grad_(True) for name in names]
            with environment(two[0].device, exact, grad=True):
                grads = gradients_of(lambda: twin.fuse(twin.encode(*two)), leaves)
            check_gradients(kind, names, own_grads, grads, tolerance, module, self.all_used)

    def _own(
        self, twin: SpecifiedModel, hooked: nn.Module, two: tuple[Tensor, ...]
    ) -> tuple[Any, list[Tensor | None]]:
        """What the module returns and gradients of the tuned tensors, from one run: its hooks are
        the user's."""
        leaves = [hooked.get_parameter(name.removeprefix("module.")) for name in sorted(self.tuned)]
        returned: list[Any] = []

        def run() -> Tensor:
            returned.append(hooked(*(x.clone() for x in two)))
            return twin.own_logits(returned[-1])

        if not leaves:
            run()
            return returned[-1], []
        for leaf in leaves:
            leaf.requires_grad_(True)
        with torch.enable_grad():
            grads = gradients_of(run, leaves)
        return rebuilt(returned[-1], Tensor.detach), grads

    def merge_into(self, module: nn.Module, name: str, value: Tensor) -> None:
        module.get_parameter(self.prefix + name.removeprefix("module.")).copy_(value)


def recognise(model: nn.Module, spec: ModelSpec | None = None) -> Recognised:
    """The model as methods see it: ``fasttta.models.CAVMAE``, any module with the parts and
    parameter names of the official one, or with a spec any fusion transformer; in DataParallel,
    DDP or torch.compile or not. Of BriMPR's PromptVA prompts are taken along.

    Raises:
        TypeError: it is none of the known models; says what was looked for and found.
        ValueError: it looks like one but cannot be converted, or the spec does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    refuse_unusable(model)
    if spec is not None:
        return _by_spec(model, spec)
    if isinstance(model, FeatureClassifier):
        return _own(f"fasttta.models.{type(model).__name__}", model)
    inner, prefix, holder = model, "", None
    while not all(_owns(inner, part) for part in _CAVMAE_PARTS):
        wrapped = _wrapped(inner)
        if wrapped is None:
            raise TypeError(_unknown(model, inner))
        refuse_wrapper_hooks(inner)
        if wrapped == "va_model":
            holder = inner, prefix
        inner, prefix = getattr(inner, wrapped), f"{prefix}{wrapped}."
    if isinstance(inner, CAVMAE):
        _refuse_replaced(inner)
        recognised = _own("fasttta.models.CAVMAE", inner, prefix)
    else:
        recognised = _convert(inner, prefix)
    return recognised if holder is None else _with_prompts(recognised, *holder)


def _own(family: str, model: Any, prefix: str = "") -> Recognised:
    """A model of fasttta's own, which runs as it is; compared where it may be another."""
    return Recognised(family, model, prefix, module=model if altered(model) else None)


def _by_spec(model: nn.Module, spec: ModelSpec) -> Specified:
    if not isinstance(spec, ModelSpec):
        raise TypeError(f"spec must be a fasttta.ModelSpec, found {type(spec).__name__}")
    inner, prefix = model, ""
    while (wrapped := _wrapped(inner)) not in (None, "va_model"):
        refuse_wrapper_hooks(inner)
        inner, prefix = getattr(inner, wrapped), f"{prefix}{wrapped}."
    _refuse_replaced(inner)
    fusion = SpecifiedModel(inner, spec)
    return Specified(f"{type(inner).__name__} by its ModelSpec", fusion, prefix, module=inner)


def _wrapped(module: nn.Module) -> str | None:
    """Where a wrapper keeps the module whose forward is its own; None: it is no such wrapper."""
    for kind in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        if isinstance(module, kind):  # not a subclass with a forward of its own
            return "module" if type(module).forward is kind.forward else None
    if type(module).__name__ == "OptimizedModule":  # torch.compile
        return "_orig_mod"
    if _owns(module, "va_model") and _owns(module, "prompts_a") and _owns(module, "prompts_v"):
        return "va_model"  # BriMPR
    return None


def _converted(dtype: torch.dtype):
    def convert(name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        return nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)

    return convert


def _in_type(module: Tree, dtype: torch.dtype) -> Tree:
    twin = structural_copy(module, _converted(dtype))
    own_buffers(cast(nn.Module, twin), dtype)
    return twin


def _refuse_replaced(model: nn.Module) -> None:
    """A forward that is bound to the object would run the original's weights in a copy."""
    for name, child in model.named_modules():
        own = vars(child).get("forward")
        if own is not None and not (isinstance(own, MethodType) and own.__self__ is child):
            raise ValueError(
                f"the forward of {name or type(model).__name__} is replaced on the object (by a "
                "patch, torch.compile or a hook library), so that a copy would run the original's "
                "weights; pass the module as it was before"
            )


def _owns(module: nn.Module, part: str) -> bool:
    """Registered in the module itself; torch.compile's wrapper passes plain attributes on."""
    return part in module._modules or part in module._parameters


def _unknown(model: nn.Module, inner: nn.Module) -> str:
    has = [part for part in _CAVMAE_PARTS if _owns(inner, part)]
    lacks = [part for part in _CAVMAE_PARTS if part not in has]
    children = ", ".join(name for name, _ in list(inner.named_children())[:8]) or "none"
    if hint := adapters_hint(inner):
        return f"{type(model).__name__} is not a model that fasttta knows: {hint}"
    near = f"; of a CAV-MAE it has {', '.join(has)} but not {', '.join(lacks)}" if has else ""
    return (
        f"{type(model).__name__} is not a model that fasttta knows; looked for "
        f"fasttta.models.CAVMAE or a module with its parts, found children {children}{near}. Any "
        "other fusion transformer needs to be told where its parts are: fasttta.adapt(model, "
        "spec=fasttta.ModelSpec.detect(model, *inputs)), or a ModelSpec written by hand; fasttta "
        "inspect package.module:name --input SHAPE --input SHAPE --emit-spec prints one"
    )


def _convert(module: nn.Module, prefix: str) -> Recognised:
    """A CAV-MAE over the weights of a module of that structure."""
    if not _owns(module, "mlp_head"):
        raise TypeError(
            f"{type(module).__name__} is a CAV-MAE without mlp_head, as it is before fine-tuning; "
            "needed one fine-tuned for classification"
        )
    refuse_wrapped_layers(module, "CAV-MAE")
    _check_head(module)
    blocks: Any = module.blocks_u  # of the user's code
    if not len(blocks):
        raise ValueError(f"blocks_u of {type(module).__name__} is empty, needed a fusion block")
    attention = blocks[0].attn
    heads = getattr(attention, "num_heads", None)
    if not isinstance(heads, int):
        raise ValueError(
            f"blocks_u.0.attn.num_heads of {type(module).__name__} must be an int, found {heads!r}"
        )
    with torch.inference_mode(False):
        state = {
            name: x.detach().clone() if x.is_inference() else x.detach()
            for name, x in module.state_dict().items()
        }
    split = sorted({m[1] for m in map(SPLIT_QKV.fullmatch, state) if m})
    if tuple(split) not in _FLAVOURS:
        raise ValueError(
            f"blocks_u.0.attn has separate projections {', '.join(split)}; known: none, q k v, or "
            "qa ka va qv kv vv"
        )
    plain = {name: x for name, x in state.items() if not SPLIT_QKV.fullmatch(name)}
    tokens = state["pos_embed_a"].shape[1] + state["pos_embed_v"].shape[1]
    # Those modules compute with the split copies once their first forward is over, and only on
    # sequences of more than 512 tokens; normally they are views of the packed weight by then.
    if split and getattr(attention, "first_batch", True) is False and tokens > 512:
        for i in range(len(blocks)):
            for part in ("weight", "bias"):
                rows = [state[f"blocks_u.{i}.attn.{which}.{part}"] for which in _used(split)]
                packed = f"blocks_u.{i}.attn.qkv.{part}"
                if not torch.equal(torch.cat(rows), plain[packed]):
                    plain[packed] = torch.cat(rows)
    with torch.inference_mode(False):
        fusion = CAVMAE.from_tensors(plain, num_heads=heads).requires_grad_(False)
    return Recognised(_FLAVOURS[tuple(split)], fusion, prefix, tuple(split), module)


def _check_head(module: nn.Module) -> None:
    """Raises ValueError if the classifier is another than the published one."""
    head = module.get_submodule("mlp_head")
    parts = {f"mlp_head.{name}" for name, _ in head.named_parameters()}
    if parts != {f"mlp_head.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")}:
        raise ValueError(
            f"{type(module).__name__} has the parts of a CAV-MAE, but another head: mlp_head is "
            f"{' '.join(str(module.mlp_head).split())[:120]}, needed a LayerNorm and a linear "
            "layer. It can be adapted as it is by saying where its parts are: fasttta.adapt(model, "
            'spec=fasttta.ModelSpec([f"blocks_u.{i}.attn" for i in '
            'range(len(model.blocks_u))], {"audio": (0, Ta), "video": (Ta, Ta + Tv)}, "qkv"))'
        )


def _used(split: list[str]) -> tuple[str, ...]:
    """The copies that compute, in the order of the packed weight (ABPEM's qv, kv, vv are the same
    modules as its qa, ka, va)."""
    return ("qa", "ka", "va") if "qa" in split else ("q", "k", "v")
