"""Kernels compile for every GPU family without one: no spilled register, memory that a block has.

The core set here; tests/compile_ahead.py --all is the whole.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# not importorskip, which would import it before other tests choose its interpreter
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)
SCRIPT = Path(__file__).with_name("compile_ahead.py")
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def compiling():
    """A process a target, so that a crash of the compiler is one target's and says whose; all at
    the same time."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    command = [sys.executable, "-P", str(SCRIPT), "--json"]
    running = {target: subprocess.Popen([*command, target], **pipes) for target in TARGETS}
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_core(compiling, target):
    out, err = compiling[target].communicate(timeout=900)
    assert out.startswith("{"), err[-3000:]
    found = json.loads(out)
    assert found["problems"] == []
    assert {row["kernel"] for row in found["kernels"]} == {
        "_tiles_kernel", "_merge_kernel", "_weighted_scores_kernel", "_token_gradients_kernel",
        "_moments_kernel", "_gradient_kernel", "_rows_kernel", "_batch_kernel", "_samples_kernel",
        "_columns_kernel", "_strips_kernel", "_ensemble_kernel", "_small_kernel",
        "_row_attention_kernel", "_weigh_rows_kernel", "_sums_kernel",
        "_attention_gradients_kernel", "_prefix_attention_kernel", "_prefix_gradients_kernel",
        "_add_tiles_kernel",
    }  # fmt: skip
