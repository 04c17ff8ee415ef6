"""Files from outside: read for their tensors, told by what they are, and never run."""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from archives import Calls, load_script, pickled, rewrite, save_script, writes
from safetensors.torch import save_file
from torch import nn

from fasttta.files import inert_pickle, read_file
from fasttta.files.inert_pickle import Name, Record


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3).half())
        self.plain = torch.ones(3)  # neither parameter nor buffer

    def forward(self, x: torch.Tensor):
        return x * self.scale * self.plain


class Outer(nn.Module):
    """All that a TorchScript archive may hold of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.tied = self.linear.weight
        self.layers = nn.ModuleList([Inner(), nn.Sequential(Inner(), nn.BatchNorm1d(3))])
        self.transposed = nn.Parameter(torch.randn(4, 5).t())
        self.sliced = nn.Parameter(torch.randn(9)[2:8:2])
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("wide", torch.randn(2, dtype=torch.float64))
        self.register_buffer("brain", torch.randn(2).bfloat16())

    def forward(self, x: torch.Tensor):
        return self.linear(x)


class Evil(nn.Module):
    """Its ``__setstate__`` overwrites a file, in TorchScript."""

    def __init__(self, victim: str, marker: str) -> None:
        super().__init__()
        self.w, self.victim, self.marker = nn.Parameter(torch.zeros(3)), victim, marker

    def forward(self, x: torch.Tensor):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.w, self.victim, self.marker, self.training)

    @torch.jit.export
    def __setstate__(self, s: tuple[torch.Tensor, str, str, bool]):
        self.w, self.victim, self.marker, self.training = s[0], s[1], s[2], s[3]
        print("this must not run")
        torch.save(s[0], s[2])
        t = torch.from_file(s[1], True, 6, dtype=torch.uint8)
        t.copy_(torch.tensor([112, 119, 110, 101, 100, 10]).to(torch.uint8))
        self.w = s[0] + t.sum() * 0


def test_a_script_is_read_as_its_state_dict(tmp_path):
    """Bit for bit what PyTorch's loader makes of it, strides and shared memory included."""
    torch.manual_seed(0)
    path = save_script(Outer(), tmp_path / "outer.pt")
    state, expected = read_file(path), load_script(path)
    assert list(state) == list(expected)
    assert "layers.1.0.scale" in state
    for name, x in expected.items():
        assert state[name].dtype == x.dtype
        assert state[name].stride() == x.stride()
        assert torch.equal(state[name], x)
    assert state["tied"].data_ptr() == state["linear.weight"].data_ptr()
    for changes in ({"constants.pkl": None}, {"code/anything.py": b"\xff"}):
        again = read_file(rewrite(path, tmp_path / "changed.pt", changes))
        assert all(torch.equal(again[name], x) for name, x in expected.items())
    code = [n for n in zipfile.ZipFile(path).namelist() if "/code/" in n]
    ends = {name.split("/", 1)[1]: None for name in code}
    bare = read_file(rewrite(path, tmp_path / "bare.pt", ends))
    assert bare.keys() == expected.keys() | {"layers.0.plain", "layers.1.0.plain"}


def test_byte_order(tmp_path):
    """An archive of a machine of the other byte order, and one whose members are compressed."""
    state = {"a": torch.arange(5.0), "b": torch.tensor([1, -2]), "c": torch.tensor([True, False])}
    torch.save(state, tmp_path / "a.pt")
    widths = {"data/0": 4, "data/1": 8, "data/2": 1}
    changes = {
        name: lambda data, w=width: np.frombuffer(data, f"u{w}").byteswap().tobytes()
        for name, width in widths.items()
    }
    rewrite(tmp_path / "a.pt", tmp_path / "big.pt", {**changes, "byteorder": b"big"})
    rewrite(tmp_path / "a.pt", tmp_path / "packed.pt", {}, compressed=True)
    for name in ("big.pt", "packed.pt"):
        again = read_file(tmp_path / name)
        assert all(torch.equal(again[n], x) for n, x in state.items())
    rewrite(tmp_path / "a.pt", tmp_path / "odd.pt", {"byteorder": b"middle"})
    with pytest.raises(ValueError, match="byte order is 'middle'"):
        read_file(tmp_path / "odd.pt")


def test_a_script_is_not_run(tmp_path, capfd):
    from fasttta.cli import main
    from fasttta.models import CAVMAE, CLIP, RationalHead

    victim, marker = tmp_path / "victim.txt", tmp_path / "marker"
    victim.write_text("original")
    path = save_script(Evil(str(victim), str(marker)), tmp_path / "evil.pt")
    for read in (CLIP.from_checkpoint, CAVMAE.from_checkpoint, RationalHead.from_checkpoint):
        with pytest.raises(ValueError, match=r"evil.pt.*Evil\) is stored in a form"):
            read(path)
    assert main(["inspect", str(path)]) == 2
    assert "must not run" not in capfd.readouterr().out
    assert victim.read_text() == "original"
    assert not marker.exists()
    load_script(path)  # what PyTorch itself does: the test can fail
    assert victim.read_text() == "pwned\nal"
    assert marker.exists()


def test_pickles_are_not_run(tmp_path):
    """New and old files of torch.save, plain pickles of all protocols, a changed script."""
    marker, path = tmp_path / "marker", tmp_path / "file"
    code = writes(marker)
    script = save_script(Outer(), tmp_path / "outer.pt")
    tensors = {"a": torch.ones(2)}

    def cases():
        for new in (True, False):
            torch.save({**tensors, "b": code}, path, _use_new_zipfile_serialization=new)
            yield "posix.system"
        for protocol in (2, 3, 4, 5):
            pickled({**tensors, "b": code}, path, protocol)
            yield "it would call posix.system"
        pickled({"b": Calls(eval, "1")}, path)
        yield "it would call __builtin__.eval|it would call builtins.eval"
        pickled({"b": Calls(torch.load, "x")}, path)
        yield "it would call torch.serialization.load"
        storage = Calls(torch.storage._load_from_bytes, pickle.dumps(code))
        pickled(
            {"b": Calls(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, {})}, path
        )
        yield "values were not written by torch.save"
        rewrite(script, path, {"data.pkl": pickle.dumps(code, protocol=2)})
        yield "it would call posix.system"
        rewrite(script, path, {"data.pkl": b"\x80\x02cos\nsystem\n(U\x01xtR."})
        yield "the pickle operation SHORT_BINSTRING"
        torch.save(nn.Linear(2, 2), path)
        yield "an object of the class torch.nn.modules.linear.Linear"

    count = 0
    for match in cases():
        count += 1
        with pytest.raises(ValueError, match=match) as raised:
            read_file(path)
        assert "weights_only" not in str(raised.value)
        assert "was not run" in str(raised.value)
    assert count == 12
    assert not marker.exists()


def test_what_scripts_save_beside_weights(tmp_path):
    """Arguments, numbers of NumPy and the like are left inert."""
    extra = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x"), names={"a"}),
        "best": np.float64(0.5), "table": np.ones(3), "counts": collections.Counter("aab"),
        "lists": collections.defaultdict(list), "size": torch.Size([2]),
        "device": torch.device("cpu"), "order": collections.OrderedDict(a=1),
    }  # fmt: skip
    torch.save({"model": nn.Linear(2, 3).state_dict(), **extra}, tmp_path / "a.pt")
    state = read_file(tmp_path / "a.pt")
    assert state["model"].keys() == {"weight", "bias"}
    assert state["args"].name == Name("argparse", "Namespace")
    assert state["args"].state["out"].made_of == ("x",)
    assert isinstance(state["best"], Record)
    assert (state["counts"], state["size"], state["order"]) == ({"a": 2, "b": 1}, (2,), {"a": 1})


DAMAGE = {
    "storage missing": ({"data/0": None}, "storage data/0 is missing"),
    "storage short": ({"data/0": lambda x: x[:-1]}, "storage 0 holds 5 values, needed 6"),
    "no pickle": ({"data.pkl": None}, "without a data.pkl"),
    "empty pickle": ({"data.pkl": b""}, "pickle is damaged|cut short"),
    "twice": ({"ROOT/data/0": b"x" * 24, "data.pkl": lambda x: x}, "'.*data/0' twice"),
    "upwards": ({"ROOT/../../x": b""}, "a member at '.*/x'"),
    "absolute": ({"/etc/x": b""}, "a member at '/etc/x'"),
    "backslash": ({"ROOT\\x": b""}, "a member at"),
    "two roots": ({"other/data.pkl": b""}, "several data.pkl"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_archives(tmp_path, case):
    changes, match = DAMAGE[case]
    torch.save({"a": torch.arange(6.0)}, tmp_path / "a.pt")
    if case == "twice":  # rewrite replaces members that it finds
        with zipfile.ZipFile(tmp_path / "a.pt", "a") as file, pytest.warns(match="Duplicate"):
            file.writestr(file.namelist()[0].split("/")[0] + "/data/0", b"x" * 24)
    else:
        rewrite(tmp_path / "a.pt", tmp_path / "b.pt", changes)
        (tmp_path / "b.pt").replace(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=match):
        read_file(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("size", "stride", "offset", "match"),
    [
        ((6,), (1,), 1, "needs 7 values, and its storage holds 6"),
        ((2, 3), (4, 1), 0, "needs 7 values"),
        ((-1,), (1,), 0, "negative size"),
        ((2,), (-1,), 5, "negative size, stride or offset"),
        ((2,), (1,), -1, "negative"),
        ((2**40, 2**40), (0, 0), 0, "larger than any memory"),
        ((0, 2**62, 2**62), (0, 0, 0), 0, "larger than any memory"),
        ((2.0,), (1,), 0, "are not integers"),
        ((2,), (1, 1), 0, "1 sizes and 2 strides"),
        ((1,) * 65, (1,) * 65, 0, "65 sizes"),
        ("aa", (1, 1), 0, "are not integers"),
    ],
)
def test_tensors_stay_in_their_storage(tmp_path, size, stride, offset, match):
    class Lying:
        def __reduce__(self):
            storage = torch.arange(6.0).untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32,
                                               _internal=True)  # fmt: skip
            return torch._utils._rebuild_tensor_v2, (typed, offset, size, stride, False, {})

    torch.save({"a": Lying()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=match):
        read_file(tmp_path / "a.pt")


def test_bombs(tmp_path):
    """Little that unpacks to much: zip members, pickles, headers, views of one value."""
    import fasttta

    torch.save({"a": torch.zeros(2**23)}, tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", tmp_path / "zip.pt", {}, compressed=True)
    with pytest.raises(ValueError, match=r"bytes would unpack to 33,554,432"):
        read_file(tmp_path / "zip.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        root = file.namelist()[0].split("/")[0]
    # a memo index that a C unpickler would allocate, and tuples that are expensive to hash
    (tmp_path / "memo.pkl").write_bytes(b"\x80\x02Nr\xff\xff\xff\xff.")
    assert read_file(tmp_path / "memo.pkl") is None
    nest = b"\x80\x02}N\x85q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"h\x00Ns."
    (tmp_path / "nest.pkl").write_bytes(nest)
    with pytest.raises(ValueError, match="a dict has a key of the type tuple"):
        read_file(tmp_path / "nest.pkl")
    rewrite(tmp_path / "a.pt", tmp_path / "nest.pt", {"data.pkl": nest, f"{root}/x": b""})
    with pytest.raises(ValueError, match="a dict has a key of the type tuple"):
        read_file(tmp_path / "nest.pt")
    (tmp_path / "header").write_bytes(struct.pack("<Q", 2**39) + b'{"a": 1}')
    with pytest.raises(ValueError, match="damaged safetensors"):
        read_file(tmp_path / "header")
    for new in (True, False):
        views = {"a": torch.zeros(1).expand(2**40)}
        torch.save(views, tmp_path / "views.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match="views that repeat a few values"):
            fasttta.models.CAVMAE.from_checkpoint(tmp_path / "views.pt", num_heads=1)


def test_a_module_within_itself(tmp_path):
    script = save_script(Outer(), tmp_path / "a.pt")
    # an A whose attribute b is itself
    cycle = b"\x80\x02c__torch__\nA\n)\x81q\x00}(X\x01\x00\x00\x00bh\x00ub."
    rewrite(script, tmp_path / "b.pt", {"data.pkl": cycle})
    with pytest.raises(ValueError, match="a module holds itself"):
        read_file(tmp_path / "b.pt")
    # 60 modules, each twice in the next: 2**60 paths
    shared = b"\x80\x02" + b"c__torch__\nA\n)\x81q\x00}b"
    for _ in range(60):
        twice = b"(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00u"
        shared += b"0c__torch__\nA\n)\x81}" + twice + b"bq\x00"
    rewrite(script, tmp_path / "c.pt", {"data.pkl": shared + b"."})
    with pytest.raises(ValueError, match="a module holds itself"):
        read_file(tmp_path / "c.pt")


# a locator of disk 1 of 2, and an end record
_SPANNING = b"PK\x06\x07" + struct.pack("<LQL", 1, 0, 2) + b"PK\x05\x06" + bytes(18)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"epoch": 3}', "is a JSON file"),
        (b"\n[1, 2]", "is a JSON file"),
        (b"<!DOCTYPE html><html>", "is an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"\x1f\x8b\x08" + bytes(60), "is a gzip file"),
        (b"epoch,loss\n", "is a text file"),
        (b"", "is an empty file"),
        (b"\x00\x01" * 40, "of no known kind"),
        (b"\x93NUMPY\x01", "is a NumPy array"),
        (b"PK\x03\x04" + bytes(100), "zip archive is damaged or truncated"),
        # spans several disks by its end record, which Python's own test for zip files chokes on
        (b"PK\x03\x04" + bytes(60) + _SPANNING, "zip archive is damaged or truncated"),
    ],
)
def test_other_files_are_told(tmp_path, content, match):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as raised:
        read_file(path)
    assert "file" in str(raised.value)
    assert "weights_only" not in str(raised.value)


def test_what_is_no_file(tmp_path):
    import fasttta

    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with pytest.raises(ValueError, match="a zip archive of NumPy arrays"):
        read_file(tmp_path / "arrays.npz")
    with pytest.raises(ValueError, match="/dev/null' is no regular file"):
        read_file("/dev/null")
    data = io.BytesIO()
    torch.save({"a": torch.ones(1)}, data)
    for source in (data, 3, None, b"path"):
        with pytest.raises(TypeError, match="needed a path or a state dict, found"):
            fasttta.models.CAVMAE.from_checkpoint(source)
        with pytest.raises(TypeError, match="needed a path or a state dict, found"):
            fasttta.models.CLIP.from_checkpoint(source)

    class Where:
        def __fspath__(self):
            return str(tmp_path / "a.pt")

    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    assert read_file(Where())["a"].item() == 1


def test_plain_pickles_of_tensors(tmp_path):
    """Half, integer, shared and strided tensors as pickle.dump writes them."""
    base = torch.arange(6.0)
    state = {"a": [base, base[1::2]], "h": base.half(), "i": torch.tensor([3, 4])}
    for protocol in (2, 3, 4, 5):
        again = read_file(pickled(state, tmp_path / "a.pkl", protocol))
        assert torch.equal(again["a"][1], base[1::2])
        assert torch.equal(again["h"], base.half())
        assert torch.equal(again["i"], state["i"])
    data = (tmp_path / "a.pkl").read_bytes()
    (tmp_path / "a.pkl").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="truncated"):
        read_file(tmp_path / "a.pkl")


def test_states_of_containers_are_ignored():
    """OrderedDicts of state dicts carry versions of modules."""
    data = pickle.dumps(collections.OrderedDict(a=1), protocol=2)[:-1] + b"}X\x01\x00\x00\x00xNsb."
    assert inert_pickle.load(data) == {"a": 1}


def test_safetensors_of_other_kinds(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}, tmp_path / "a")
    assert set(read_file(tmp_path / "a")) == {"a", "b"}
    data = (tmp_path / "a").read_bytes()
    for old, new in ((b"F32", b"F99"), (b'"shape":[2]', b'"shape":[9]'), (b'"data', b'"dxta')):
        (tmp_path / "b").write_bytes(data.replace(old, new))
        with pytest.raises(ValueError, match="damaged safetensors"):
            read_file(tmp_path / "b")
