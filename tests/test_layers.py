"""The house: who imports whom, what an import costs, names that stay callable."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from clips import tiny_clip, tiny_ids, tiny_views
from places import ROOT

PACKAGE = ROOT / "fasttta"

# lower imports nothing above it; one line is one level
LEVELS = (
    ("trace", "console", "kernels", "csrc", "__init__"),
    ("files",),
    ("ops",),
    ("functional",),
    ("protocols",),
    ("views",),
    ("models", "methods"),
    ("engine",),
    ("families_dual",),
    ("families_check", "families_weights", "families_wrapped"),
    ("families", "families_clip", "classes", "episodes"),
    ("collect", "finetuning"),
    ("inspection_clip", "imported_model"),
    (
        "entry",
        "adapted",
        "adapted_clip",
        "adapted_head",
        "adapted_state",
        "environment",
        "inspection",
    ),
    ("data",),
    ("evaluate",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def _imports(path: Path):
    """Rooms of fasttta that a file imports, at any depth of nesting."""
    room = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fasttta":
                    yield [*alias.name.split("."), "__init__"][1]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = list(room[: len(room) - node.level])
                parts = base + (node.module.split(".") if node.module else [])
                names = [alias.name for alias in node.names]
                yield from parts[:1] or [n if n in LEVEL else "__init__" for n in names]
            elif node.module and node.module.split(".")[0] == "fasttta":
                yield [*node.module.split("."), "__init__"][1]


def test_import_direction():
    files = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]
    assert len(files) > 20
    for path in files:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert own in LEVEL, f"{own} has no level"
        for other in _imports(path):
            assert other == own or LEVEL[other] < LEVEL[own] or {own, other} <= {
                "entry", "adapted", "adapted_clip", "adapted_head", "adapted_state",
            }, f"{path.relative_to(ROOT)} imports {other}"  # fmt: skip
            assert not (own == "methods" and other == "models")
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "fasttta" not in path.read_text().replace("of fasttta", "")


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
    found = json.loads(_python(code))
    heavy = {"triton", "sklearn", "scipy", "PIL", "nvtx", "pytest", "transformers", "matplotlib"}
    assert not heavy & set(found["new"])
    assert not found["cuda"]
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
