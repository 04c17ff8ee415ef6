"""What a type checker sees of the public names."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import fasttta

ROOMS = ("data", "evaluate", "functional", "methods", "models")

# calls, and the type that each of them has
CALLS = {
    "fasttta.adapt(module)": "fasttta.adapted.fusion.AdaptedFusion",
    'fasttta.adapt(module, "abpem", k=8)': "fasttta.adapted.fusion.AdaptedFusion",
    "fasttta.adapt(module, name, seed=1)": "fasttta.adapted.fusion.AdaptedFusion",
    "fasttta.adapt(module, classes=names)": "fasttta.adapted.images.AdaptedCLIP",
    'fasttta.adapt(module, "mta", classes=ids)': "fasttta.adapted.images.AdaptedCLIP",
    "fasttta.adapt(module, fasttta.methods.TPT(), classes=names)":
        "fasttta.adapted.images.AdaptedCLIP",
    'fasttta.adapt(module, "rada", classes=names)': "fasttta.adapted.head.AdaptedHead",
    "fasttta.adapt(module, fasttta.methods.RAda(), classes=names)":
        "fasttta.adapted.head.AdaptedHead",
    "fasttta.load(module, name)": "fasttta.adapted.base.Adapted",
    "fasttta.adapt(module).step(ids).logits": "torch._tensor.Tensor",
    "fasttta.adapt(module).tuned": "dict[str, torch._tensor.Tensor]",
    "fasttta.methods.ABPEM(k=3).k": "int",
    "fasttta.models.CAVMAE.from_checkpoint(name)": "fasttta.models.cavmae.model.CAVMAE",
    "fasttta.functional.entropy(ids)": "torch._tensor.Tensor",
    "fasttta.functional.attention_bootstrap(ids, ids, (1, 2))": "torch._tensor.Tensor",
    "fasttta.functional.attention_bootstrap(ids, ids, (1, 2), return_moments=True)[1].std":
        "torch._tensor.Tensor",
}  # fmt: skip

HEAD = """
import fasttta
import fasttta.data, fasttta.evaluate, fasttta.functional, fasttta.methods, fasttta.models
from torch import Tensor, nn
module: nn.Module
name: str
names: list[str]
ids: Tensor
"""


def _public() -> list[str]:
    return [
        *(f"fasttta.{name}" for name in fasttta.__all__),
        *(f"fasttta.{room}.{name}" for room in ROOMS for name in getattr(fasttta, room).__all__),
    ]


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Runs mypy on a program that uses fasttta; returns what it prints."""
    pytest.importorskip("mypy", reason="needs the package mypy: pip install 'fasttta[dev]'")
    folder = tmp_path_factory.mktemp("types")

    def run(code: str) -> str:
        program = folder / "program.py"
        program.write_text(code)
        command = [sys.executable, "-m", "mypy", "--cache-dir", folder / "cache"]
        return subprocess.run(
            [*command, "--follow-imports", "silent", program],
            cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True,
        ).stdout  # fmt: skip

    return run


@pytest.mark.slow
def test_public_names_have_types(mypy):
    expressions = [*_public(), *CALLS]
    assert len(expressions) > 60
    out = mypy(HEAD + "\n".join(f"reveal_type({text})" for text in expressions))
    first = HEAD.count("\n") + 1
    revealed = {
        expressions[int(line) - first]: kind
        for line, kind in re.findall(r':(\d+): note: Revealed type is "(.*)"', out)
    }
    assert revealed.keys() == set(expressions), out
    unknown = [text for text, kind in revealed.items() if kind in ("Any", "builtins.object")]
    assert not unknown
    assert {text: revealed[text] for text in CALLS} == CALLS
    assert "error" not in out


@pytest.mark.slow
def test_a_name_that_does_not_exist_is_an_error(mypy):
    out = mypy(HEAD + "fasttta.adaptt\nfasttta.methods.ABPEMM\n")
    assert out.count("[attr-defined]") == 2, out


def test_dir_shows_public_names_only():
    assert dir(fasttta) == sorted(fasttta.__all__)
    assert dir(fasttta.functional) == sorted(fasttta.functional.__all__)
    for name in fasttta.functional.__all__:
        value = getattr(fasttta.functional, name)
        assert callable(value)
        assert value.__module__ == "fasttta.functional", name


def test_public_names_are_found_where_type_checkers_look():
    """What TYPE_CHECKING imports and what a first use imports are the same objects."""
    tree = ast.parse(Path(fasttta.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and _is_checking(n.test)][:1]
    seen = {}
    for statement in block.body:
        for alias in statement.names:
            seen[alias.name] = statement.module
    assert set(seen) == set(fasttta.__all__) - {"__version__"}
    for name, home in seen.items():
        if home is None:
            assert getattr(fasttta, name).__name__ == f"fasttta.{name}"
        else:
            module = importlib.import_module(f"fasttta.{home}")
            assert getattr(fasttta, name) is getattr(module, name)


def _is_checking(test) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"
