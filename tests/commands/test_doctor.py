"""fasttta doctor."""

from __future__ import annotations

import json
import re

import pytest
import torch
from op_cases import composite

import fasttta
from fasttta import cli, environment


def _run(capsys, *arguments):
    status = cli.main(list(arguments))
    return status, *capsys.readouterr()


def test_doctor(capsys):
    status, out, _ = _run(capsys, "doctor", "--json")
    diagnosis = json.loads(out)
    assert status == 0
    assert diagnosis["fasttta"] == fasttta.__version__
    assert diagnosis["packages"]["torch"] == torch.__version__.split("+")[0] or (
        diagnosis["packages"]["torch"] == torch.__version__
    )
    assert bool(diagnosis["cuda"]["gpus"]) == torch.cuda.is_available()
    forward = {name for name in vars(composite) if not name.endswith("_backward")}
    assert list(diagnosis["operations"]) == sorted(forward)  # whichever is imported first
    # what it says of a backend is what asking for it says
    q = torch.randn(1, 1, 4, 2)
    why_not = diagnosis["operations"]["score_moments"]["cpp"]
    with pytest.raises(ValueError, match=re.escape(why_not)):
        fasttta.functional.score_moments(q, q, (2, 2), backend="cpp")
    built = diagnosis["native"]["library"] is not None
    assert diagnosis["operations"]["entropy"]["cpu"] == ("cpp" if built else "composite")
    assert (diagnosis["operations"]["entropy"]["cpp"] == "live") == built
    status, out, _ = _run(capsys, "doctor")
    assert status == 0
    for word in (*forward, diagnosis["processor"]["name"], "torch", "engine", "GPU"):
        assert word in out


def test_doctor_asks_the_dispatcher():
    """A kernel that is registered shows up without anybody telling doctor."""
    library = torch.library.Library("fasttta", "IMPL")
    before = environment.diagnose()["operations"]["score_moments"]["cpp"]
    library.impl("score_moments", lambda q, k, *_: (q, k), "CPU")
    try:
        assert environment.diagnose()["operations"]["score_moments"]["cpp"] == "live"
    finally:
        library._destroy()
    assert environment.diagnose()["operations"]["score_moments"]["cpp"] == before != "live"


def test_doctor_without_a_package(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    diagnosis = environment.diagnose()
    assert diagnosis["packages"]["no-such-package"] is None
    assert "no-such-package missing" in environment.table(diagnosis)


def test_doctor_names_optional_packages(capsys, monkeypatch):
    real = environment._version
    monkeypatch.setattr(
        environment, "_version", lambda name: None if name in ("matplotlib", "peft") else real(name)
    )
    out = _run(capsys, "doctor")[1]
    assert re.search(r"matplotlib +not installed: pip install 'fasttta\[report\]'", out)
    # the extra, where the installed metadata has it
    assert re.search(r"peft +not installed: pip install ('fasttta\[wild\]'|peft) ", out)
    assert re.search(rf"triton +({re.escape(real('triton') or 'not installed')})", out)
    for name in ("jinja2", "transformers", "tokenizers", "soundfile", "soxr", "open_clip_torch"):
        assert re.search(rf"^optional +{name} ", out, re.MULTILINE), name


def test_doctor_columns_do_not_run_together(capsys):
    out = _run(capsys, "doctor")[1]
    rows = out[out.index("\noperation") :].split("\n\n")[0].splitlines()[2:]
    forward = [name for name in vars(composite) if not name.endswith("_backward")]
    assert [row.split()[0] for row in rows] == sorted(forward)
    assert {len(row.split()) for row in rows} == {3}


def test_doctor_says_where_float8_is_multiplied(capsys, monkeypatch):
    if not torch.cuda.is_available():
        assert environment.diagnose()["precision_fp8"].startswith("cpu: emulated, slower than bf16")
    assert re.search(r"^fp8 +(cpu|cuda:0): ", _run(capsys, "doctor")[1], re.MULTILINE)
    reasons = {0: None, 1: "compute capability 8.0 has no float8 products"}
    monkeypatch.setattr(environment, "emulated", lambda device: reasons[device.index])
    assert environment._float8(2) == (
        "cuda:0: live; cuda:1: emulated, slower than bf16: compute capability 8.0 has no float8 "
        "products"
    )
