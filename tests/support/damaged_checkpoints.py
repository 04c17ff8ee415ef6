"""Checkpoints damaged, changed or made hostile, at random by a seed."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import torch
from archives import Calls, rewrite, save_script, writes
from clips import tiny_clip
from safetensors.torch import save_file
from torch import nn

from fasttta import SourceStats
from fasttta.models import CAVMAE, RationalHead


class Script(nn.Module):
    """Parameters by the names of a state dict."""

    def __init__(self, state) -> None:
        super().__init__()
        for name, x in state.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(x.clone(), requires_grad=False))

    def forward(self, x: torch.Tensor):
        return x


class Fuzz:
    """Objects and files to start from, and a random generator for what is done to them."""

    def __init__(self, folder: Path, model: CAVMAE) -> None:
        self.folder, self.marker = folder, folder / "marker"
        torch.manual_seed(0)
        clip = {n: x for n, x in tiny_clip().state_dict().items() if "tracked" not in n}
        pair = torch.rand(2, 3), torch.rand(2, 3)
        self.objects = {
            "cav-mae": dict(model.state_dict()),
            "clip": clip,
            "head": dict(RationalHead(8, 2).state_dict()),
            "statistics": (pair, pair, (torch.rand(1, 3), torch.rand(1, 3))),
            "fisher": {"module.norm.weight": [torch.rand(3), torch.rand(3)]},
        }
        self.scripts = {
            name: save_script(Script(self.objects[name]), folder / f"{name}.script.pt")
            for name in ("cav-mae", "clip", "head")
        }
        SourceStats(audio=pair, video=pair, joint=pair).save(folder / "stats.safetensors")

    def seed(self, number: int) -> None:
        self.random = random.Random(number)
        self.path = self.folder / "case"
        self.path.unlink(missing_ok=True)
        self.kind = self.random.choice(list(self.objects))

    def object(self):
        """A shallow copy that may be changed."""
        value = self.objects[self.kind]
        return dict(value) if isinstance(value, dict) else list(value)

    def write(self, thing, formats=("new", "old", "pickle", "safetensors")) -> None:
        form = self.random.choice(formats)
        plain = isinstance(thing, dict) and all(isinstance(x, torch.Tensor) for x in thing.values())
        if form == "safetensors" and plain:
            try:
                save_file({str(n): x.contiguous() for n, x in thing.items()}, self.path)
                return
            except (ValueError, RuntimeError, KeyError):
                pass
        if form == "pickle":
            try:
                data = pickle.dumps(thing, protocol=self.random.choice([0, 1, 2, 3, 4, 5]))
                self.path.write_bytes(data)
                return
            except (NotImplementedError, RuntimeError, AttributeError):
                pass
        torch.save(thing, self.path, _use_new_zipfile_serialization=form != "old")

    def file(self) -> bytes:
        """The bytes of some sound file."""
        choice = self.random.random()
        if choice < 0.3 and self.kind in self.scripts:
            return self.scripts[self.kind].read_bytes()
        if choice < 0.4:
            return (self.folder / "stats.safetensors").read_bytes()
        self.write(self.object())
        return self.path.read_bytes()

    def one(self, thing):
        """A random place of a container: (the container, its key)."""
        keys = list(thing) if isinstance(thing, dict) else range(len(thing))
        return self.random.choice(list(keys))


def truncated(f: Fuzz) -> None:
    data = f.file()
    f.path.write_bytes(data[: f.random.randrange(len(data))])


def flipped(f: Fuzz) -> None:
    data = bytearray(f.file())
    where = len(data) if f.random.random() < 0.5 else min(len(data), 400)
    for _ in range(f.random.choice([1, 1, 3, 20])):
        data[f.random.randrange(where)] = f.random.randrange(256)
    f.path.write_bytes(data)


def spliced(f: Fuzz) -> None:
    data = f.file()
    a, b = sorted(f.random.randrange(len(data)) for _ in range(2))
    piece = f.random.choice([b"", bytes(b - a), data[a:b] * 2, f.random.randbytes(50)])
    f.path.write_bytes(data[:a] + piece + data[b:])


def retyped(f: Fuzz) -> None:
    thing = f.object()
    odd = [
        3, "x", None, [1], {}, 1.5, b"y", torch.ones(2, dtype=torch.int32), torch.tensor(True),
        torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"), torch.Size([1]),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.ones(2).to(torch.float8_e4m3fn), nn.Parameter(torch.ones(1)), torch.device("cpu"),
    ]  # fmt: skip
    for _ in range(f.random.choice([1, 2, 5])):
        thing[f.one(thing)] = f.random.choice(odd)
    f.write(thing)


def renamed(f: Fuzz) -> None:
    thing = f.object()
    if isinstance(thing, dict):
        for _ in range(f.random.choice([1, 2, 5])):
            key = f.one(thing)
            x, name = thing.pop(key) if f.random.random() < 0.8 else thing[key], str(key)
            new = f.random.choice(
                [f"module.{name}", name[:-1], name.upper(), 7, ("a", name), "",
                 name.replace("0", "9"), "blocks_a.12345678901234567890.x", "prompts_a",
                 "visual.proj", "q_proj1.weight"]
            )  # fmt: skip
            thing[new] = x
    f.write(thing)


def reshaped(f: Fuzz) -> None:
    thing = f.object()
    for _ in range(f.random.choice([1, 2, 5])):
        key = f.one(thing)
        small = isinstance(thing[key], torch.Tensor) and 0 < thing[key].numel() < 10**5
        x = thing[key] if small else torch.rand(4, 3)
        thing[key] = f.random.choice(
            [x.flatten(), x.flatten()[:0], x.new_zeros(()), x.unsqueeze(0), x.new_zeros(2, 0, 3),
             x.new_ones(1).expand(f.random.choice([7, 10**4])), x.new_ones(1).expand(10**11),
             x.t() if x.ndim == 2 else x.unsqueeze(-1), x.new_zeros(1 + x.numel())]
        )  # fmt: skip
    f.write(thing)


def poisoned(f: Fuzz) -> None:
    thing = f.object()
    for _ in range(f.random.choice([1, 3])):
        key = f.one(thing)
        tensor = thing[key] if isinstance(thing[key], torch.Tensor) else torch.rand(2, 3)
        x = tensor.clone().flatten()
        x[f.random.randrange(len(x))] = f.random.choice([torch.nan, torch.inf, -torch.inf])
        thing[key] = x.view(tensor.shape)
    f.write(thing)


def nested(f: Fuzz) -> None:
    thing = f.object()
    for _ in range(f.random.choice([1, 2, 12])):
        wrap = f.random.choice(["state_dict", "model", "net", "module", "other", "list", "tuple"])
        thing = (
            [thing] if wrap == "list" else (thing,) if wrap == "tuple" else {wrap: thing, "n": 1}
        )
    f.write(thing)


def code(f: Fuzz) -> None:
    """Whatever the format and the depth, and by every operation that calls."""
    mark = str(f.marker)
    evil = f.random.choice(
        [writes(f.marker), Calls(exec, f"open({mark!r}, 'w')"), Calls(open, mark, "w"),
         Calls(eval, f"open({mark!r}, 'w')"), Calls(torch.save, torch.ones(1), mark),
         Calls(Path.touch, f.marker), Calls(os.mkdir, mark)]
    )  # fmt: skip
    if f.random.random() < 0.4:
        quoted = mark.encode()
        text = b"X" + struct.pack("<I", len(quoted)) + quoted
        streams = [
            b"\x80\x02(" + text + b"ios\nmkdir\n.",
            b"\x80\x02(cos\nmkdir\n" + text + b"o.",
            b"\x80\x02cos\nmkdir\n" + text + b"\x85\x81.",
            b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text + b"\x85R.",
            b"\x80\x02ctorch._utils\n_rebuild_parameter\ncos\nmkdir\n" + text + b"\x85R\x85R.",
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\ncos\nmkdir\nN" + text + b"\x85\x87R.",
            b"\x80\x02ccopyreg\n_reconstructor\ncos\nmkdir\n" + text + b"N\x87R.",
            b"\x80\x02ccollections\nOrderedDict\n)Rcos\nmkdir\n" + text + b"\x85R" + text + b"Nsb.",
            b"\x80\x02c__torch__\nos.mkdir\n" + text + b"\x85\x81cos\nmkdir\n" + text + b"\x85Rb.",
        ]
        data = f.random.choice(streams)
        if f.random.random() < 0.5 and f.kind in f.scripts:
            rewrite(f.scripts[f.kind], f.path, {"data.pkl": data})
        else:
            f.path.write_bytes(data)
        return
    thing: object = f.object()
    spot = f.random.random()
    if spot < 0.5:
        thing[f.one(thing)] = evil  # type: ignore[index]
    else:
        thing = {"state_dict": thing, "args": evil} if spot < 0.8 else [evil]
    if f.random.random() < 0.3 and f.kind in f.scripts:
        rewrite(f.scripts[f.kind], f.path, {"data.pkl": pickle.dumps(evil, protocol=2)})
    else:
        f.write(thing, ("new", "old", "pickle"))


def _changed(f: Fuzz, data: bytes) -> bytes:
    changed = bytearray(data or b"x")
    for _ in range(f.random.choice([1, 1, 2, 8])):
        if not changed:
            break
        at = f.random.randrange(len(changed))
        how = f.random.random()
        if how < 0.5:
            changed[at] = f.random.randrange(256)
        elif how < 0.75:
            del changed[at : at + f.random.choice([1, 4, 30])]
        else:
            changed[at:at] = f.random.choice([b"R", b"b", b"\x85", b"}", b"(", b"0", b"\x81", b"Q"])
    return bytes(changed)


def changed_pickles(f: Fuzz) -> None:
    """Of scripts and of torch.save, with checksums that fit."""
    source = f.scripts.get(f.kind)
    if source is None or f.random.random() < 0.5:
        source = f.folder / "sound"
        torch.save(f.object(), source)
    name = f.random.choice(["data.pkl"] * 6 + ["data/0", "byteorder", "version", "constants.pkl"])
    rewrite(source, f.path, {name: lambda data: _changed(f, data)})


def members(f: Fuzz) -> None:
    """Of zip archives: dropped, added, doubled, renamed, compressed."""
    source = f.scripts.get(f.kind, f.scripts["clip"])
    with zipfile.ZipFile(source) as file:
        ends = [name.split("/", 1)[1] for name in file.namelist()]
    name = f.random.choice(ends)
    changes = f.random.choice(
        [{name: None}, {name: b""}, {"../../x": b"y"}, {"/x": b""}, {"x/data.pkl": b"N."},
         {name: lambda data: data[:-1]}, {name: lambda data: data * 2}, {"ROOT/data/9999": b"1"},
         {"data.pkl": b"\x80\x02N."}, {"data.pkl": b"\x80\x02}."}]
    )  # fmt: skip
    rewrite(source, f.path, changes, compressed=f.random.random() < 0.5)


def headers(f: Fuzz) -> None:
    """Of safetensors."""
    kinds = [k for k, x in f.objects.items() if k in ("cav-mae", "clip", "head")]
    save_file({n: x.contiguous() for n, x in f.objects[f.random.choice(kinds)].items()}, f.path)
    data = f.path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = f.random.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    how = f.random.randrange(8)
    if how == 0:
        entry["dtype"] = f.random.choice(["F64", "BF16", "I8", "X", "F8_E4M3", "BOOL", 3])
    elif how == 1:
        entry["shape"] = f.random.choice([[], [2**62], [-1], [2**40, 2**40], ["1"], [0], None])
    elif how == 2:
        entry["data_offsets"] = f.random.choice([[0, 0], [0, 2**40], [5, 1], [-4, 0], [1, 2, 3]])
    elif how == 3:
        header[f.random.choice(["", "a" * 10**5, "module." + name])] = entry
    elif how == 4:
        del header[name]
    elif how == 5:
        header["__metadata__"] = f.random.choice([3, {"a": 1}, [], {"n": "x"}])
    text = json.dumps(header).encode()
    if how == 6:
        text = b'{"a":' * 10_000
    size = f.random.choice([2**63, 2**39, 0, len(text) * 2]) if how == 7 else len(text)
    f.path.write_bytes(struct.pack("<Q", size) + text + body)


def bombs(f: Fuzz) -> None:
    size = f.random.choice([2**24, 2**26])
    how = f.random.randrange(4)
    if how == 0:
        torch.save({"a": torch.zeros(size // 4)}, f.folder / "zeros")
        rewrite(f.folder / "zeros", f.path, {}, compressed=True)
    elif how == 1:
        rewrite(f.scripts["head"], f.path, {"data.pkl": b"\x80\x02" + b"N0" * 10**5}, True)
    elif how == 2:
        count = f.random.choice([60, 5000])
        nest = b"\x80\x02}N\x85q\x000" + b"h\x00h\x00\x86q\x000" * count
        f.path.write_bytes(nest + f.random.choice([b"h\x00Ns.", b"X\x01\x00\x00\x00ah\x00s."]))
    else:
        views = torch.zeros(1).expand(f.random.choice([2**31, 2**40]))
        f.write({**f.objects["head"], "out_proj.bias": views}, ("new", "old"))


_OPERATIONS = (
    b"(.012FIJKMNPQRSTUVXabcdeghijloprstu}]\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x93"
)


def streams(f: Fuzz) -> None:
    """Random operations, and names that could be called."""
    names = [b"cos\nmkdir\n", b"cbuiltins\nexec\n", b"c__torch__\nA\n", b"cargparse\nNamespace\n",
             b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
             b"X\x01\x00\x00\x00a", b"K\x05", b"}", b")"]  # fmt: skip
    parts = [b"\x80\x02"]
    for _ in range(f.random.choice([3, 10, 40, 200])):
        if f.random.random() < 0.4:
            parts.append(f.random.choice(names))
        else:
            parts.append(bytes([f.random.choice(_OPERATIONS)]))
    data = b"".join(parts) + b"."
    if f.random.random() < 0.5:
        f.path.write_bytes(data)
    else:
        rewrite(f.scripts["head"], f.path, {"data.pkl": data})


MUTATIONS = (
    truncated, flipped, spliced, retyped, renamed, reshaped, poisoned, nested, code,
    changed_pickles, members, headers, bombs, streams,
)  # fmt: skip
