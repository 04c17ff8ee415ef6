"""One dispatched operation: what it launches, moves and multiplies, by the shapes of its tensors.

Costs are those of PyTorch's kernels on a GPU: a kernel an operation, but for those of ``_LAUNCHES``
and for lists of tensors. ``fasttta``'s own operators declare theirs beside their schemas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.registry import OPERATORS

PRODUCTS, ATTENTION, OWN = "matrix products", "attention", "fasttta's kernels"
NORM, ACTIVATION, COPIES, OTHER = "layer norm", "activations", "copies and casts", "elementwise"
KINDS = (PRODUCTS, ATTENTION, OWN, NORM, ACTIVATION, COPIES, OTHER)

#: Operations that launch nothing: views, allocations, questions about a tensor.
FREE = {
    "_efficientzerotensor", "_pin_memory", "_reshape_alias", "_unsafe_view", "alias",
    "as_strided", "chunk", "detach", "device", "diagonal", "dtype", "empty", "empty_like",
    "empty_strided", "expand", "is_pinned", "is_same_size", "layout", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "promote_types", "resize_", "select", "set_", "slice", "split",
    "split_with_sizes", "squeeze", "storage_offset", "sym_numel", "sym_size",
    "sym_storage_offset", "sym_stride", "t", "transpose", "unbind", "unflatten", "unfold",
    "unsqueeze", "view",
}  # fmt: skip
# kernels of operations that start more than one
_LAUNCHES = {
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_cudnn_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3, "sort": 4, "argsort": 4, "topk": 3,
    "kthvalue": 3, "index_put": 4, "index_put_": 4, "nonzero": 5, "std": 2, "var": 2,
}  # fmt: skip
# tensors that one kernel over lists takes, by the number of its lists, and its blocks of values
_TENSORS_A_LAUNCH, _BLOCKS, _BLOCK = {1: 110, 2: 64, 3: 48, 4: 36}, 320, 65536

# what attention reaches of the rate of large products: 350 and 280 of 790 TFLOP/s on an H200 in
# bf16, forward and backward (flash 2); 30 of 50 in fp32 (efficient attention)
_ATTENTION_SHARES = (0.443, 0.354, 0.6)

_PRODUCTS = (
    "mm",
    "addmm",
    "addmm_",
    "bmm",
    "baddbmm",
    "_addmm_activation",
    "_scaled_mm",
    "mv",
    "addmv",
)
_NORMS = ("layer_norm", "batch_norm", "group_norm", "rms_norm")
_ACTIVATIONS = ("gelu", "silu", "relu", "sigmoid", "tanh", "threshold")
_COPIES = ("_to_copy", "copy_", "clone", "contiguous", "cat", "stack", "_foreach_copy_", "repeat")
# operations that read no more of their first tensor than they return
_SELECTING = ("index_select", "index", "gather", "embedding", "take", "take_along_dim")
# operations that write their first tensor, or rows of it, without reading it
_WRITING = ("copy_", "fill_", "zero_", "uniform_", "normal_", "bernoulli_", "exponential_",
            "random_", "_foreach_copy_", "_foreach_zero_")  # fmt: skip
_WRITING_ROWS = ("index_copy_", "index_put_", "scatter_", "index_fill_", "_index_put_impl_")


@dataclass(frozen=True, slots=True)
class Operation:
    """What one operation costs.

    Attributes:
        name: of the dispatcher, without overload; kind: one of ``KINDS``.
        launches: kernels. bytes: read and written. flops: of matrix products and attention.
        rate: whose rate of a GPU bounds the FLOP: "fp8", "bf16" (fp16 too), "tf32", "fp32", "fp64".
        share: how much of that rate is expected, apart from the sizes of a product.
        product: (m, n, k, batch) of a matrix product, else None.
        where: source line that called it, or that whose gradient it computes.
    """

    name: str
    kind: str
    launches: int
    bytes: int
    flops: int = 0
    rate: str = "fp32"
    share: float = 1.0
    product: tuple[int, int, int, int] | None = None
    where: str = ""


def tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists and dicts."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for each in x:
            yield from tensors(each)
    elif isinstance(x, dict):
        yield from tensors(list(x.values()))


def is_on_gpu(x: Tensor) -> bool:
    """Whether it lies on the fake GPU; asking x itself would be one more dispatch."""
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def size(x: Tensor) -> int:
    """Bytes of memory that a tensor covers: expanded dimensions count once."""
    strides = zip(x.shape, x.stride(), strict=True)
    return x.element_size() * math.prod(1 if stride == 0 else n for n, stride in strides)


def _key(x: Tensor) -> tuple:
    return id(x.untyped_storage()), x.storage_offset(), tuple(x.shape), x.stride()


def moved(name: str, func: Any, args: tuple, kwargs: dict, results: list[Tensor]) -> int:
    """Bytes that an operation reads and writes: every tensor once, rows where only these count."""
    places = {argument.name for argument in func._schema.arguments if argument.is_out}
    kept = {name: x for name, x in kwargs.items() if name not in places}  # out= is not read
    read = {_key(x): size(x) for x in tensors((args, kept)) if is_on_gpu(x)}
    written = {_key(x): size(x) for x in results}
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {_key(x): size(x) for x in tensors(value)}
    first = _key(args[0]) if args and isinstance(args[0], Tensor) else None
    if name in _SELECTING and first in read:
        read[first] = min(read[first], sum(written.values()))
    elif name in _WRITING:
        for x in tensors(args[0]):
            read.pop(_key(x), None)
    elif name in _WRITING_ROWS and first in read:
        del read[first]
        written = {first: sum(read.values())}
    return sum(read.values()) + sum(written.values())


def rate_of(x: Tensor) -> str:
    """Whose rate of a GPU bounds products of tensors of this type."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    if x.dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
    return "fp64" if x.dtype == torch.float64 else "fp8"


def _list_launches(args: tuple) -> int:
    """Launches of a kernel over lists of tensors."""
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    if not lists:
        return 1
    blocks = sum(-(-x.numel() // _BLOCK) for x in lists[0])
    at_once = _TENSORS_A_LAUNCH.get(len(lists), 30)
    return max(1, -(-len(lists[0]) // at_once), -(-blocks // _BLOCKS))


def _product(name: str, args: tuple, results: list[Tensor]) -> tuple[int, int, int, int]:
    """(m, n, k, batch) of a product; of a convolution as a product of its patches."""
    matrices = [x for x in tensors(args) if x.ndim > 1]
    if "convolution" in name:
        weight, made = matrices[-1], args[0] if "backward" in name else results[0]
        both = 2 if "backward" in name and all(args[-1][:2]) else 1  # of inputs and of weights
        channels = weight.shape[0]
        return made.numel() // channels, channels, math.prod(weight.shape[1:]), both
    if name in ("mv", "addmv"):
        return matrices[0].shape[0], 1, matrices[0].shape[1], 1
    a, b = args[:2] if name == "_scaled_mm" else matrices[-2:]
    return a.shape[-2], b.shape[-1], a.shape[-1], a.shape[0] if a.ndim == 3 else 1


def measured(func: Any, args: tuple, kwargs: dict, results: list[Tensor], where: str) -> Operation:
    """The cost of an operation of PyTorch, or of ``fasttta`` with a Triton kernel."""
    name = func._schema.name.partition("::")[2]
    bytes_ = moved(name, func, args, kwargs, results)
    if func.namespace == "fasttta":
        operator = OPERATORS[name]
        if operator.cost is None:
            raise TypeError(f"fasttta::{name} declares no cost: say cost= in its define()")
        cost = operator.cost(*args)
        main = next((x for x in tensors(args) if x.ndim > 1), next(tensors(args)))
        return Operation(
            name, OWN, cost.launches, bytes_ + cost.workspace, cost.flops, rate_of(main),
            cost.share, None, where,
        )  # fmt: skip
    launches = _LAUNCHES.get(name, 1)
    if name == "native_layer_norm_backward":
        launches = 2 if any(args[-1][1:]) else 1  # one of weight and bias, one of what comes in
    if name.startswith(("_foreach", "_fused_", "_amp_foreach")):
        launches = _list_launches(args)
    if name in _PRODUCTS or "convolution" in name:
        m, n, k, batch = _product(name, args, results)
        operands = [x for x in tensors(args) if x.ndim > 1]
        operand = operands[0 if name == "_scaled_mm" else -1]  # whose last are scales
        return Operation(
            name, PRODUCTS, launches, bytes_, 2 * m * n * k * batch, rate_of(operand), 1.0,
            (m, n, k, batch), where,
        )  # fmt: skip
    if "scaled_dot_product" in name:
        backward, precise = "backward" in name, args[0].dtype == torch.float32
        q, key = args[1:3] if backward else args[:2]
        flops = (10 if backward else 4) * q.numel() * key.shape[-2]
        share = _ATTENTION_SHARES[2 if precise else backward]
        return Operation(name, ATTENTION, launches, bytes_, flops, rate_of(q), share, None, where)
    return Operation(name, _kind(name), launches, bytes_, where=where)


def _kind(name: str) -> str:
    if any(x in name for x in _NORMS):
        return NORM
    if name in _COPIES:
        return COPIES
    return ACTIVATION if any(x in name for x in _ACTIVATIONS) else OTHER
