"""Kernels compile for every GPU family without one: no spilled register, memory that a block has.

The core cases run here; tests/compile_ahead.py --all has all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from places import TESTS

# not importorskip, which would import it before other tests choose its interpreter
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)
SCRIPT = TESTS / "compile_ahead.py"
TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_core(target):
    """A process for each target, so that a crash of the compiler names its target."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", str(SCRIPT), "--json", target]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.stdout.startswith("{"), done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["problems"] == []
    float8 = {"_rows_in_float8_kernel", "_normalise_in_float8_kernel"}
    assert {row["kernel"] for row in report["kernels"]} == {
        "_tiles_kernel", "_merge_kernel", "_weighted_scores_kernel", "_token_gradients_kernel",
        "_token_moments_kernel", "_moments_kernel", "_gradient_kernel", "_rows_kernel",
        "_balance_kernel", "_samples_kernel",
        "_columns_kernel", "_strips_kernel", "_ensemble_kernel", "_small_kernel",
        "_row_attention_kernel", "_weigh_rows_kernel", "_sums_kernel",
        "_attention_gradients_kernel", "_prefix_attention_kernel", "_prefix_gradients_kernel",
        "_add_tiles_kernel", "_normalise_kernel", "_row_gradients_kernel", "_activation_kernel",
    } | (float8 if target in ("sm_90", "sm_100", "sm_120") else set())  # fmt: skip
