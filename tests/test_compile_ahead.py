"""Every kernel is compiled for GPUs that need not be there: nothing spills, everything fits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_ahead.py"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which Linux has"
)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_fits(target, tmp_path):
    """In a process of its own: a compiler that dies takes nothing else with it."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, SCRIPT, target, "--json"], env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("{"), done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["problems"] == []
    kernels = {row["kernel"] for row in found["kernels"]}
    assert len(kernels) >= 10, kernels
    assert all(row["registers"] > 0 for row in found["kernels"])
