"""The house: which room imports which, no circles, few modules at the top, light imports."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clips import tiny_clip, tiny_ids, tiny_views
from places import ROOT

PACKAGE = ROOT / "fasttta"

# A room imports rooms of the lines above its own. The words of one line do not know each other.
FLOORS = (
    ("__init__",),
    ("trace", "kernels", "csrc", "files"),
    ("ops",),
    ("functional",),
    ("source_stats",),
    ("protocols", "views"),
    ("models", "methods"),
    ("engine",),
    ("families", "data"),
    ("adapted", "environment"),
    ("evaluate", "cost"),
    ("commands", "demo"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _files() -> list[Path]:
    """The package's files but its front page, whose names are resolved when they are asked for."""
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(files) > 100
    return files


def _module(path: Path) -> tuple[str, ...]:
    """A file's module below fasttta: ("engine", "step"); of a folder's front page the folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imported(path: Path, modules: set[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Modules of fasttta that a file imports anywhere: in functions and for types, too."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            bases = [alias.name.split(".") for alias in node.names]
            yield from (tuple(base[1:]) for base in bases if base[0] == "fasttta")
        elif isinstance(node, ast.ImportFrom):
            named = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = (*folder[: len(folder) - node.level + 1], *named)
            elif named[0] == "fasttta":
                base = named[1:]
            else:
                continue
            for alias in node.names:
                module = (*base, alias.name)
                yield module if module in modules else base


def _graph() -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Which module imports which. fasttta itself, which holds the version, is left out."""
    modules = {_module(path) for path in _files()}
    return {
        _module(path): {m for m in _imported(path, modules) if m and m != _module(path)}
        for path in _files()
    }


def _circles(graph: dict[tuple[str, ...], set[tuple[str, ...]]]) -> list[list[str]]:
    """Modules that import each other, directly or through others."""
    reached: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for module in graph.get(waiting.pop(), ()):
                if module not in seen:
                    seen.add(module)
                    waiting.append(module)
        reached[start] = seen
    circles = {
        frozenset(m for m in reached[start] if start in reached.get(m, ()))
        for start in graph
        if start in reached[start]
    }
    return [sorted(".".join(module) for module in circle) for circle in circles]


def test_rooms_import_downwards():
    for module, imported in _graph().items():
        room = module[0]
        assert room in FLOOR, f"{room} has no floor"
        for other in imported:
            assert other[0] == room or FLOOR[other[0]] < FLOOR[room], (
                f"fasttta/{'/'.join(module)}.py imports {'.'.join(other)}"
            )


def test_no_module_imports_itself_through_others():
    assert _circles(_graph()) == []


def test_a_circle_is_seen():
    a, b, c = ("a",), ("b",), ("c",)
    assert _circles({a: {b}, b: {c}, c: {a}}) == [["a", "b", "c"]]
    assert _circles({a: {b, c}, b: {c}, c: set()}) == []


def test_few_modules_at_the_top():
    modules = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= 8, sorted(modules)


def test_kernels_import_no_fasttta():
    files = list((ROOT / "kernels").rglob("*.py"))
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                depth = len(path.relative_to(ROOT / "kernels").parts)
                assert node.level <= depth, f"{path} imports from above kernels/"
                assert node.level or node.module.split(".")[0] != "fasttta", path
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "fasttta" for alias in node.names), path


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_import_is_light():
    """torch is what importing may cost: no Triton, no optional package, no device probe."""
    code = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import fasttta
fasttta.adapt, fasttta.functional, fasttta.models, fasttta.methods, fasttta.data
seconds = time.perf_counter() - start
new = {name.split(".")[0] for name in set(sys.modules) - before}
import json
print(json.dumps({"new": sorted(new), "cuda": torch.cuda.is_initialized(), "s": seconds}))
"""
    imported = json.loads(_python(code))
    heavy = {
        "triton",
        "jinja2",
        "sklearn",
        "scipy",
        "PIL",
        "nvtx",
        "pytest",
        "transformers",
        "matplotlib",
    }
    assert not heavy & set(imported["new"])
    assert not imported["cuda"]
    plain = _python("import sys; import fasttta; print('torch' in sys.modules)")
    assert plain.strip() == "False"


def test_kernels_do_not_leak():
    spec = importlib.util.find_spec("kernels")
    assert spec is None or ROOT not in Path(spec.origin or "").resolve().parents
    assert importlib.util.find_spec("fasttta.kernels") is not None
    assert importlib.util.find_spec("fasttta.csrc") is not None


def test_public_names_can_be_called_twice(tiny_model, tiny_batch, tmp_path):
    import fasttta

    model, batch = tiny_model(), tiny_batch()
    for _ in range(2):
        adapted = fasttta.adapt(model, "read")
        adapted(*batch)
        adapted.save(tmp_path)
        fasttta.load(model, tmp_path)
        fasttta.SourceStats(**vars(fasttta.collect_stats(model, [batch])))
        assert isinstance(adapted, fasttta.Adapted)
        assert isinstance(adapted.step(*batch), fasttta.StepResult)
        fasttta.collect_fisher(model, [batch])
        fasttta.methods.names()
        fasttta.ShiftDetector().update(1.0)
        head, features = fasttta.models.RationalHead(8, 2), _directions()
        fasttta.finetune(head, features, features.argmax(1), features, epochs=1)
        fasttta.FineTuning(head, features).step(features, features.argmax(1))
        fasttta.methods.by_name("read").preset("paper")
        fasttta.models.CAVMAE.from_checkpoint(model.state_dict(), num_heads=3)
        clip = fasttta.models.CLIP.from_checkpoint(tiny_clip().state_dict())
        fasttta.adapt(clip, classes=tiny_ids(), views=4, select=0.5).step(views=tiny_views(4))
        fasttta.data.fbank(*_tone())
        fasttta.data.cavmae_audio(*_tone())
    assert set(fasttta.__all__) <= set(dir(fasttta))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fasttta.nothing  # noqa: B018


def _directions():
    import torch

    return torch.eye(8)


def _tone():
    import torch

    return torch.sin(torch.arange(8000.0) / 7), 16000
