"""Reads pickles of tensors and containers without calling anything; other objects stay inert."""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

#: more operations than any checkpoint has (a CLIP's archive: 20,000); they take some 10 s
_MOST_OPERATIONS = 5_000_000
_MOST_DIMENSIONS = 64  # PyTorch's limit


class Refused(ValueError):
    """A pickle that needs more than tensors and containers; the message says what."""


class Name(NamedTuple):
    """A class or function that a pickle names; it is neither imported nor called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a class that was not imported: the arguments it was made from, its state."""

    name: Name
    made_of: Any = ()
    state: Any = None


class Storage(NamedTuple):
    """The memory that tensors of a file are views of."""

    memory: Tensor  # 1-d


class Unreadable(NamedTuple):
    """A tensor whose values are not plain numbers in memory, and its kind."""

    kind: str


_TENSOR_KINDS = {
    "_rebuild_qtensor": "quantised",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_meta_tensor_no_storage": "on the meta device",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_tensor_v3": "of a type that is no plain float or integer",
    "_rebuild_wrapper_subclass": "a tensor subclass",
    "_rebuild_device_tensor_from_numpy": "of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "of another device",
}
# what stands beside weights in training scripts' files; only their names are looked at
_HARMLESS = {
    "argparse.Namespace", "types.SimpleNamespace", "builtins.set", "builtins.frozenset",
    "builtins.bytearray", "builtins.complex", "builtins.slice", "builtins.range",
    "builtins.object", "__builtin__.set", "__builtin__.object", "_codecs.encode", "numpy.dtype",
    "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "torch.device",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    "datetime.datetime", "datetime.timedelta", "datetime.date",
    "torch.serialization._get_layout",
}  # fmt: skip
_LISTS = {"build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"}


def is_script(name: Name) -> bool:
    """Whether a name is that of a TorchScript class, whose code lies in the file."""
    return name.module == "__torch__" or name.module.startswith("__torch__.")


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """The view of a storage that a file describes.

    Raises:
        Refused: it is not described by numbers, or reaches beyond its storage.
    """
    if not isinstance(storage, Storage):
        raise Refused("a tensor has no storage")
    memory, numbers = (
        storage.memory,
        isinstance(size, (tuple, list)) and isinstance(stride, (tuple, list)),
    )
    if not numbers or any(type(n) is not int for n in (offset, *size, *stride)):
        raise Refused("the size or strides of a tensor are not integers")
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise Refused(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    if min((offset, *size, *stride)) < 0:
        raise Refused("a tensor has a negative size, stride or offset")
    if math.prod(n for n in size if n) >= 2**62 or max(stride, default=0) >= 2**62:
        raise Refused(f"a tensor of shape {_short(size)} is larger than any memory")
    empty = 0 in size
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset > len(memory) or (not empty and last >= len(memory)):
        raise Refused(
            f"a tensor of shape {_short(size)} needs {last + 1:,} values, and its storage holds "
            f"{len(memory):,}"
        )
    if empty:
        return memory.new_empty(tuple(size))
    return memory.as_strided(tuple(size), tuple(stride), offset)


def _short(size: Any) -> str:
    return f"[{', '.join(map(str, list(size)[:8]))}{', ...' if len(size) > 8 else ''}]"


@dataclass
class _Machine:
    """The stack of one pickle."""

    persistent: Callable[[Any], Storage | Unreadable]
    nested: Callable[[bytes], Storage]
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def call(self, function: Any, arguments: Any) -> Any:
        """The result of a function that the file names, for the few that make tensors."""
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Refused("it calls something that is not a function")
        if str(function) == "copyreg._reconstructor" and arguments:
            return self.make(arguments[0], arguments[1:])
        if function.module == "collections":
            if function.name == "OrderedDict":
                return dict(_pairs(arguments[0])) if arguments else {}
            if function.name in ("defaultdict", "Counter"):
                counts = arguments[0] if arguments and function.name == "Counter" else {}
                return dict(_pairs(counts))
        if function.module == "torch._utils":
            if function.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
                if (
                    len(arguments) > 6
                    and isinstance(arguments[6], dict)
                    and arguments[6].get("neg")
                ):
                    raise Refused("a tensor is stored negated: save its x.resolve_neg()")
                return rebuild_tensor(*arguments[:4])
            if function.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                return arguments[0]
            if function.name in _TENSOR_KINDS:
                return Unreadable(_TENSOR_KINDS[function.name])
        if str(function) == "torch._tensor._rebuild_from_type_v2" and len(arguments) > 2:
            return self.call(arguments[0], arguments[2])
        if str(function) == "torch.storage._load_from_bytes":
            return self.nested(_bytes(arguments[0]))
        if str(function) == "torch.Size" and isinstance(arguments[0], (tuple, list)):
            return tuple(arguments[0])
        if function.module == "torch.jit._pickle":
            if function.name in _LISTS and isinstance(arguments[0], list):
                return arguments[0]
            if function.name == "restore_type_tag":
                return arguments[0]
        return self.make(function, arguments)

    def make(self, name: Any, arguments: Any) -> Record:
        if isinstance(name, Name) and (is_script(name) or str(name) in _HARMLESS):
            return Record(name, arguments)
        raise Refused(f"it names {name}" if isinstance(name, Name) else "an object has no class")

    def build(self, state: Any) -> None:
        thing = self.stack[-1]
        if isinstance(thing, Record):
            thing.state = state
        elif not isinstance(thing, (dict, Tensor)):  # state dicts carry versions, tensors hooks
            raise Refused(f"it sets the state of a {type(thing).__name__}, which has none")


def _bytes(stored: Any) -> bytes:
    """Bytes; protocol 2 stores them as text and the codec that encodes it."""
    if isinstance(stored, Record) and str(stored.name) == "_codecs.encode":
        text = stored.made_of[0] if isinstance(stored.made_of, tuple) and stored.made_of else None
        stored = text.encode("latin1") if isinstance(text, str) else text
    if not isinstance(stored, (bytes, bytearray)):
        raise Refused("the values of a tensor are not stored as bytes")
    return bytes(stored)


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    pairs = list(items.items() if isinstance(items, dict) else items)
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise Refused("a dict holds something other than pairs of key and value")
    return [(_key(key), value) for key, value in pairs]


def _key(key: Any) -> Any:
    """Keys of plain types only: those of nested tuples may take for ever to hash."""
    plain = (str, int, float, bytes, type(None), Name)
    flat = type(key) is tuple and len(key) <= 16 and all(isinstance(x, plain) for x in key)
    if isinstance(key, plain) or flat:
        return key
    raise Refused(f"a dict has a key of the type {type(key).__name__}")


def _put(container: Any, items: list[Any]) -> None:
    if not isinstance(container, dict) or len(items) % 2:
        raise Refused("a dict holds something other than pairs of key and value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        container[_key(key)] = value


def _extend(container: Any, items: list[Any]) -> None:
    if type(container) is not list:
        raise Refused(f"it appends to a {type(container).__name__}; only lists can grow")
    container.extend(items)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "INT", "LONG", "FLOAT",
    "UNICODE",
}  # fmt: skip
_EMPTY: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _run(machine: _Machine, operation: str, argument: Any) -> None:
    m, stack = machine, machine.stack
    if operation in ("PROTO", "FRAME"):
        return
    if operation in ("BINPUT", "LONG_BINPUT", "PUT"):
        m.memo[argument] = stack[-1]
    elif operation == "MEMOIZE":
        m.memo[len(m.memo)] = stack[-1]
    elif operation in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(m.memo[argument])
    elif operation in _VALUES:
        stack.append(argument)
    elif operation in _CONSTANTS:
        stack.append(_CONSTANTS[operation])
    elif operation in _EMPTY:
        stack.append(_EMPTY[operation]())
    elif operation == "MARK":
        m.marks.append(stack)
        m.stack = []
    elif operation in _TUPLES:
        n = _TUPLES[operation]
        if len(stack) < n:
            raise IndexError
        stack[-n:] = [tuple(stack[-n:])]
    elif operation in ("TUPLE", "LIST", "FROZENSET", "DICT"):
        items = m.pop_mark()
        made: Any = tuple(items) if operation == "TUPLE" else items
        if operation == "DICT":
            made = {}
            _put(made, items)
        m.stack.append(made)
    elif operation == "SETITEMS":
        items = m.pop_mark()
        _put(m.stack[-1], items)
    elif operation == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _put(stack[-1], [key, value])
    elif operation in ("APPENDS", "ADDITEMS"):
        items = m.pop_mark()
        _extend(m.stack[-1], items)
    elif operation == "APPEND":
        value = stack.pop()
        _extend(stack[-1], [value])
    elif operation == "GLOBAL":
        stack.append(Name(*argument.split(" ", 1)))
    elif operation == "STACK_GLOBAL":
        name, module = stack.pop(), stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise Refused("a class has no name")
        stack.append(Name(module, name))
    elif operation == "BINPERSID":
        stack.append(m.persistent(stack.pop()))
    elif operation == "REDUCE":
        arguments = stack.pop()
        stack.append(m.call(stack.pop(), arguments))
    elif operation in ("NEWOBJ", "NEWOBJ_EX"):
        if operation == "NEWOBJ_EX":
            stack.pop()
        arguments = stack.pop()
        stack.append(m.make(stack.pop(), arguments))
    elif operation == "BUILD":
        state = stack.pop()
        m.build(state)
    elif operation == "POP":
        stack.pop()
    else:
        raise Refused(f"it uses the pickle operation {operation}, which is not read")


def _no_storage(_: Any) -> NoReturn:
    raise Refused("the values of a tensor lie outside the file")


def load(
    data: bytes,
    persistent: Callable[[Any], Storage | Unreadable] = _no_storage,
    nested: Callable[[bytes], Storage] = _no_storage,
) -> Any:
    """The object of a pickle, without importing or calling anything that it names.

    Args:
        data: the pickle.
        persistent: identifier of a storage -> the storage.
        nested: bytes that ``torch.save`` made of a storage -> the storage.

    Returns:
        Dicts, lists (also for sets), tuples, numbers, text and tensors; ``Record`` for objects of
        TorchScript classes and for the few harmless ones that training scripts save beside
        weights, ``Name`` for classes, ``Unreadable`` for tensors of other kinds.

    Raises:
        Refused: it needs another class, function or operation, or is damaged.
    """
    machine, end = _Machine(persistent, nested), False
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if count > _MOST_OPERATIONS:
                raise Refused(f"it has more than {_MOST_OPERATIONS:,} pickle operations")
            if end := operation.name == "STOP":
                break
            _run(machine, operation.name, argument)
        if not end or not machine.stack:
            raise Refused("its pickle is cut short")
        return machine.stack[-1]
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
            MemoryError, RecursionError) as error:  # fmt: skip
        raise Refused(f"its pickle is damaged ({type(error).__name__})") from error


def storage_type(name: Any) -> torch.dtype | None:
    """The type of values in a storage of the class ``torch.FloatStorage`` and so on; None: none
    that holds plain numbers."""
    kinds = {
        "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
        "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
        "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
        "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
        "UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64,
        "ComplexDoubleStorage": torch.complex128,
    }  # fmt: skip
    return kinds.get(name.name) if isinstance(name, Name) else None
