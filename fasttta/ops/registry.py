"""How an operation is declared: with PyTorch's dispatcher, and with the names of its backends.

An operation's file says, in this order: its schemas, what torch.compile is told (fakes), the
reference in plain PyTorch, autograd, which arguments suit its kernels, and what these cost.
``define`` puts an operator into the dispatcher, which is what chooses an implementation:

* the default, PyTorch's calls, on every device (CompositeExplicitAutograd);
* the Triton launcher on CUDA, where Triton is there and the arguments suit its kernels;
* the C++ kernel on the CPU, which the C++ library registers itself once it is loaded. The first
  call on a CPU loads it.

``public`` names the differentiable function of an operation, and its reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .cost import Cost

#: Files of operations, one line each.
FILES = (
    "adaptation_head",
    "attention_bootstrap",
    "byte_sums",
    "entropies",
    "flat_attention",
    "gelu",
    "quick_gelu",
    "residual_layer_norm",
    "scaled_layer_norm",
    "scaled_rows",
    "score_moments",
    "shared_prefix_attention",
    "softmax_attention",
    "token_moments",
    "total_variation",
)
BACKENDS = ("reference", "triton", "cpp")

LIBRARY = torch.library.Library("fasttta", "DEF")
#: The namespace through which the operations' files call the dispatcher.
ops = torch.ops.fasttta


@dataclass(frozen=True)
class Operator:
    """One operator of the dispatcher.

    Attributes:
        default: its implementation in PyTorch's calls; None: it has a C++ kernel alone, and its
            file calls that only where it serves.
        on_cuda: what the dispatcher calls on CUDA; None: the default.
        no_triton: takes the operator's arguments, says why the Triton kernels are not made for
            them, None if they are.
        no_cpp: the same for C++ parts of the default implementation, or takes nothing and says
            what they are made for; None: the dispatcher knows whether there is a C++ kernel.
        cost: takes the operator's arguments, says what the Triton kernels cost; None: it has none.
    """

    name: str
    default: Callable[..., Any] | None
    on_cuda: Callable[..., Any] | None
    no_triton: Callable[..., str | None] | None
    no_cpp: Callable[..., str | None] | None
    cost: Callable[..., Cost] | None = None


@dataclass(frozen=True)
class Operation:
    """A differentiable function, and the plain formulation that it is compared with."""

    compute: Callable[..., Any]
    reference: Callable[..., Any]


OPERATORS: dict[str, Operator] = {}
OPERATIONS: dict[str, Operation] = {}


def operations() -> dict[str, Operation]:
    """Every public operation by name; imports the operations' files."""
    for file in FILES:
        import_module(f".{file}", __package__)
    return OPERATIONS


def define(
    schema: str,
    fake: Callable[..., Any],
    default: Callable[..., Any] | None = None,
    *,
    cpp: bool = False,
    no_cpp: Callable[..., str | None] | None = None,
    kernels: str | None = None,
    no_triton: Callable[..., str | None] | None = None,
    launch: Callable[..., Any] | None = None,
    cost: Callable[..., Cost] | None = None,
) -> None:
    """Puts an operator into PyTorch's dispatcher.

    Args:
        schema: ``name(arguments) -> results``, in the dispatcher's language.
        fake: makes results of the right shapes, types and strides, without values.
        default, no_cpp, no_triton, cost: as in ``Operator``.
        cpp: whether the C++ library has a kernel of this name.
        kernels: name of the file in kernels/ whose function of the operator's name runs its Triton
            kernels; None: it has none.
        launch: calls that function where it takes other arguments than the operator's, such as
            dense tensors alone.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"fasttta::{name}", fake, lib=LIBRARY)
    if cpp:
        native.NAMES.append(name)
    on_cuda = None
    if default is not None:
        LIBRARY.impl(name, _after_cpp(name, default) if cpp else default, _DEFAULT)
        if kernels is not None and no_triton is not None:
            on_cuda = triton.dispatch(name, kernels, launch, no_triton, default)
            LIBRARY.impl(name, on_cuda, "CUDA")
    getattr(ops, name)  # now: torch.compile refuses a call that would add it while it traces
    OPERATORS[name] = Operator(name, default, on_cuda, no_triton, no_cpp, cost)


_DEFAULT = "CompositeExplicitAutograd"


def _after_cpp(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """A default implementation that on a CPU first loads the C++ kernels: once these are
    registered the dispatcher no longer comes here."""

    def call(first: Tensor, *others):
        if first.device.type == "cpu" and native.load():
            return getattr(torch.ops.fasttta, name)(first, *others)
        return default(first, *others)

    return call


def public(name: str, compute: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """Names an operation for ``backend=``: its differentiable function and its reference."""
    OPERATIONS[name] = Operation(compute, reference)


def has_kernel(name: str, key: str) -> bool:
    """Whether the dispatcher has a kernel of an operator for "CPU" or "CUDA" alone."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fasttta::{name}", key)


def refusal(name: str, backend: str, *args: Any) -> str | None:
    """Says why a named backend cannot compute an operation; None if it can.

    Args:
        args: those of the operation; without any, the question is whether the backend is there.
    """
    if backend == "reference":
        return None
    operator = OPERATORS.get(name)
    if operator is None:
        return (
            f"{name} has no {backend} kernel: PyTorch's own elementwise kernels serve on every "
            "device"
        )
    if backend == "triton":
        return triton.refusal(name, operator.no_triton, *args)
    return _no_cpp(operator, *args)


def _no_cpp(operator: Operator, *args: Any) -> str | None:
    outcome = native.attempt()
    if has_kernel(operator.name, "CPU"):
        elsewhere = [x.device for x in args if isinstance(x, Tensor) and x.device.type != "cpu"]
        return f"it needs tensors on the CPU, found {elsewhere[0]}" if elsewhere else None
    if operator.no_cpp is not None:
        return operator.no_cpp(*args)
    if not outcome.reason:
        return f"{operator.name} has no C++ kernel"
    return f"the C++ kernels are not there: {outcome.reason}"


def named(name: str, backend: str, *args: Any) -> Any:
    """Computes an operation with a named backend, differentiably.

    Raises:
        ValueError: the backend is unknown, or cannot compute it; the message says why.
    """
    if backend not in BACKENDS:
        choices = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend={backend!r} is unknown; known: None, {choices}")
    if reason := refusal(name, backend, *args):
        raise ValueError(f"backend={backend!r}: {reason}")
    operation = OPERATIONS[name]
    return (operation.reference if backend == "reference" else operation.compute)(*args)


def wide(x: Tensor) -> Tensor:
    """x in the precision that statistics and losses are computed in: at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def result_like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised result of an operation on x, in the precision of ``wide``; for fakes."""
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def differentiate(
    formula: Callable[..., Any], *inputs: Tensor | None, wanted: int = 1, upstream: Any = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Evaluates a formula and its gradients, by autograd, in any grad mode.

    Args:
        formula: takes the inputs, returns a tensor or a tuple of tensors.
        wanted: gradients of the first result are taken on so many of the first inputs.
        upstream: gradient of the first result, of its shape; None: it is a scalar.

    Returns:
        The results, without a graph, and the gradients, dense in the inputs' types.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x if x is None else x.clone() if x.is_inference() else x.detach() for x in inputs]
        differentiated = [x.requires_grad_() for x in leaves[:wanted] if x is not None]
        results = formula(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        up = None if upstream is None else upstream.to(results[0].dtype)
        grads = torch.autograd.grad(results[0], differentiated, up)
    return tuple(x.detach() for x in results), tuple(x.contiguous() for x in grads)


def refuse_second_derivative(what: str) -> None:
    """Raises in a backward whose gradient would be differentiated again.

    A constant gradient would be silently wrong as soon as another path leads from the loss to the
    inputs, such as a residual; PyTorch's ``once_differentiable`` does not raise on these.

    Raises:
        RuntimeError: outside of torch.compile, which never differentiates a gradient.
    """
    if not torch.compiler.is_compiling():
        other = "; backend='reference' has" if what in OPERATIONS else ""
        raise RuntimeError(f"{what} has no second derivative (create_graph=True){other}")
