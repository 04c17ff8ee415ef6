"""Every method's step, as a GPU would run it: what it must not do, and what it may cost."""

from __future__ import annotations

import budgets
import pytest
import torch

import fasttta

#: (case, precision) of findings that are known, with the reason; each must still be there.
ALLOWED = {
    ("A-TPT 397", "bf16"): ("fp32 product", "clip/text.py", "text features stay float32"),
    ("A-TPT 1000", "bf16"): ("fp32 product", "clip/text.py", "text features stay float32"),
    ("RAda", "bf16"): ("fp32 product", "rational/head.py", "the tuned head runs in float32"),
}


@pytest.fixture(scope="module")
def steps():
    """Numbers of all steps, counted in two processes side by side: (case, precision, engine)."""
    processes = [budgets.counted(which) for which in ("budgets", "others")]
    counted = [x for process in processes for x in budgets.result(process)]
    return {(x["case"], x["precision"], x["engine"]): x for x in counted}


def test_every_method_is_counted_in_every_precision_and_engine(steps):
    methods = {name for name in fasttta.methods.names() if name != "source"}
    assert {x["method"] for x in steps.values()} == methods
    for precision in ("bf16", "fp32", "tf32"):
        counted = {(x["method"], x["engine"]) for k, x in steps.items() if k[1] == precision}
        captured = {x["method"] for x in steps.values() if x["captured"]}
        assert counted == {(m, "eager") for m in methods} | {(m, "graph") for m in captured}
        assert captured >= {"abpem", "read", "tent", "eata", "sar", "brimpr"}


def test_no_step_waits_for_the_host_or_mixes_devices_and_types(steps):
    unexpected, seen = [], set()
    for (case, precision, engine), step in steps.items():
        for finding in step["findings"]:
            for key in ((case, precision), (case, None)):
                kind, place, _ = ALLOWED.get(key, ("", "", ""))
                if kind and finding.startswith(kind) and place in finding:
                    seen.add(key)
                    break
            else:
                unexpected.append(f"{case}, {precision}, {engine}: {finding}")
    assert not unexpected, "\n".join(unexpected)
    assert seen == set(ALLOWED), f"mended, so remove from ALLOWED: {set(ALLOWED) - seen}"


def test_costs_are_as_budgeted(steps):
    if not torch.__version__.startswith(budgets.TORCH):
        pytest.skip(f"budgets are of torch {budgets.TORCH}, this is {torch.__version__}")
    now = budgets.text(x for x in steps.values() if x["budgeted"])
    assert not budgets.changes(now), (
        f"a step costs more or less than its budget; if that is meant: {budgets.UPDATE}\n"
        f"{budgets.changes(now)}"
    )


def test_a_float32_step_moves_no_less_and_multiplies_the_same(steps):
    """tf32 differs from fp32 in nothing but the rate of its products."""
    for (case, precision, engine), step in steps.items():
        if precision == "tf32":
            exact = steps[case, "fp32", engine]
            assert [step[x] for x in ("launches", "bytes", "flops", "peak")] == [
                exact[x] for x in ("launches", "bytes", "flops", "peak")
            ], case
            assert step["predicted"] < exact["predicted"], case
