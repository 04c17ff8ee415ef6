"""What a plain installation lacks or has broken: the library runs, and says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from places import ROOT

# packages that cannot be found, or whose import fails
BLOCK = """
import sys

class Blocks:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise BLOCKED[name.partition(".")[0]](f"No module named {name!r}")

sys.meta_path.insert(0, Blocks())
"""

USE = """
import json, warnings
import torch
import fasttta
from fasttta import cli, functional as F
from fasttta.demo.digits import load_model, stream

logits = torch.randn(6, 10, requires_grad=True)
F.entropy(logits).sum().backward()
q = torch.randn(1, 2, 8, 4, requires_grad=True)
F.attention_bootstrap(q, q, (5, 3)).sum().backward()
refusals = []
for call in (lambda: F.entropy(logits, backend="triton"),
             lambda: F.score_moments(q, q, (5, 3), backend="triton")):
    try:
        call()
    except ValueError as error:
        refusals.append(str(error))
audio, video, _ = stream("white", samples=4)[0]
result = fasttta.adapt(load_model(), "abpem", k=2, window=2).step(audio, video)
status = cli.main(["doctor"])
loaded = [name for name in BLOCKED if name in sys.modules and sys.modules[name] is not None]
print("RESULT", json.dumps({"refusals": refusals, "finite": bool(result.logits.isfinite().all()),
      "status": status, "loaded": loaded, "grad": bool(logits.grad.abs().sum() > 0)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("nvtx", ["ModuleNotFoundError", "OSError"])
def test_without_triton_ninja_and_nvtx(tmp_path, nvtx):
    """OSError: a broken installation, such as a shared library that is not there."""
    missing = "triton=ModuleNotFoundError, ninja=ModuleNotFoundError"
    code = f"BLOCKED = dict({missing}, nvtx={nvtx})\n{BLOCK}{USE}"
    environment = {**os.environ, "FASTTTA_CACHE": str(tmp_path), "PATH": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert "RESULT" in out.stdout, out.stderr[-2000:]
    report = json.loads(out.stdout.split("RESULT")[1])
    assert report["finite"]
    assert report["grad"]
    assert report["status"] == 0
    assert report["loaded"] == []
    assert len(report["refusals"]) == 2
    assert all("pip install triton" in text for text in report["refusals"])


def test_a_checkout_that_is_not_installed(tmp_path):
    """On PYTHONPATH alone: kernels and C++ sources lie beside the package, nothing else is found
    there, and no folder of the checkout is a top-level package."""
    package = tmp_path / "clone"
    package.mkdir()
    for room in ("fasttta", "kernels", "csrc", "pyproject.toml"):
        (package / room).symlink_to(ROOT / room)
    code = """
import importlib, importlib.util, sys
# an installation of this very checkout finds them by itself
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
import fasttta, fasttta.kernels, fasttta.csrc
import fasttta.kernels.shared_prefix_attention_plan
from pathlib import Path
from fasttta.ops import native_build, shared_prefix_attention
import torch
assert Path(fasttta.__file__).parent.parent == Path(CLONE), fasttta.__file__
assert len(native_build.sources()) > 5
plan = fasttta.kernels.shared_prefix_attention_plan
assert plan.TILE_TOKENS == shared_prefix_attention.TILE_TOKENS
assert fasttta.functional.entropy(torch.zeros(2, 3)).shape == (2,)
assert importlib.util.find_spec("fasttta.tests") is None
assert "kernels" not in sys.modules
""".replace("CLONE", repr(str(package)))
    environment = {**os.environ, "PYTHONPATH": str(package), "FASTTTA_NATIVE": "off"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
