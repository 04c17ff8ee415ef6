"""The log notices what a GPU's step must not do, and counts what is known by hand."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import count
import pytest

SCRIPT = Path(__file__).with_name("small_steps.py")
N = 1024
MATRIX = 2 * N * N  # bytes of a matrix in bf16


@pytest.fixture(scope="module")
def noticed():
    process = count.start(SCRIPT, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    assert not process.returncode
    return json.loads(output)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("reads_a_value", "host read"),
        ("decides_by_a_value", "host read"),
        ("chooses_by_a_mask", "host read"),
        ("synchronises", "host read"),
        ("copies_to_the_host", "blocking copy"),
        ("copies_from_the_host", "blocking copy"),
        ("makes_a_constant", "blocking copy"),
        ("copies_pageable_memory", "blocking copy"),
        ("indexes_with_the_host", "devices mixed"),
        ("multiplies_in_float32", "fp32 product"),
        ("attends_in_float32", "fp32 product"),
        ("differentiates_in_float32", "fp32 product"),
        ("computes_in_float64", "fp64"),
        ("captures_a_read", "host read"),
    ],
)
def test_a_fault_is_noticed_with_its_line(noticed, function, kind):
    findings = noticed[function]["findings"]
    assert {x["kind"] for x in findings} == {kind}
    lines = SCRIPT.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"def {function}("))
    end = next(i for i in range(begin, len(lines)) if not lines[i].strip())
    for finding in findings:
        line = int(finding["where"].removesuffix(" (captured)").rpartition(":")[2])
        assert begin + 1 < line <= end, finding


def test_a_gradient_is_its_forwards_line(noticed):
    wheres = [x["where"] for x in noticed["differentiates_in_float32"]["findings"]]
    assert sum(x.startswith("gradient of") for x in wheres) == 1 < len(wheres)


def test_a_captured_read_is_found_at_its_replay(noticed):
    (finding,) = noticed["captures_a_read"]["findings"]
    assert finding["where"].endswith("(captured)")


@pytest.mark.parametrize("function", ["copies_pinned_memory", "multiplies", "replays_a_graph"])
def test_what_a_step_may_do_is_no_finding(noticed, function):
    assert noticed[function]["findings"] == []


@pytest.mark.parametrize(
    ("function", "launches", "bytes_"),
    [
        ("multiplies", 1, 3 * MATRIX),
        ("adds", 1, 3 * MATRIX),
        ("adds_in_place", 1, 3 * MATRIX),
        ("adds_into_a_place", 1, 3 * MATRIX),
        ("multiplies_and_adds", 1, 4 * MATRIX),
        ("adds_a_row", 1, 2 * MATRIX + 2 * N),
        ("copies", 1, 2 * MATRIX),
        ("selects_rows", 1, 2 * 8 * 2 * N + 8 * 8),
        ("views", 0, 0),
        ("updates_a_list", 2, 200 * 8 * 2 * 2),
        ("replays_a_graph", 3, 9 * MATRIX),
    ],
)
def test_launches_and_bytes(noticed, function, launches, bytes_):
    operations = noticed[function]["operations"]
    assert sum(x["launches"] for x in operations) == launches
    assert sum(x["bytes"] for x in operations) == bytes_


def test_a_gradient_that_nobody_asks_for_starts_no_kernel(noticed):
    operations = noticed["differentiates_a_layer_norm"]["operations"]
    (backward,) = (x for x in operations if x["name"] == "native_layer_norm_backward")
    assert backward["launches"] == 1


def test_flops_and_peak(noticed):
    assert noticed["multiplies_and_adds"]["operations"][-1]["flops"] == 2 * N**3
    (product,) = noticed["multiplies"]["operations"]
    assert product["flops"] == 2 * N**3
    assert product["product"] == [N, N, N, 1]
    assert noticed["multiplies"]["peak"] == MATRIX
    assert noticed["adds_in_place"]["peak"] == 0
    assert noticed["frees_one_of_two"]["peak"] == MATRIX
    assert noticed["views"]["peak"] == 0


def test_a_roofline_by_hand(noticed):
    """An addition takes its bytes at 0.833 of 4.8 TB/s; a product 32 tiles of 128 x 256 of 132, or,
    faster, 128 of 64 x 128 at three quarters of the rate."""
    adds, multiplies = (noticed[x]["seconds"] for x in ("adds", "multiplies"))
    assert adds["h200"] == pytest.approx(max(3 * MATRIX / 0.833 / 4.8e12, 2e-6))
    rate = 0.8 * 989e12 * 0.75 * 128 / 132 * N / (N + 160)
    assert multiplies["h200"] == pytest.approx(2 * N**3 / rate)
    assert multiplies["a100"] > multiplies["h100"] >= multiplies["h200"] > multiplies["b200"]
    assert adds["rtx5090"] > adds["h100"] > adds["h200"] >= adds["b200"]
