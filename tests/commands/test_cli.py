"""fasttta inspect, and how every command fails, warns and ends."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import fusions
import pytest
import torch
from safetensors.torch import load_file

import fasttta
from fasttta import cli, environment, methods
from fasttta.commands import console
from fasttta.commands import inspect as inspection
from fasttta.demo.digits import MODEL_PATH, load_statistics
from fasttta.evaluate.output import as_json


def _run(capsys, *arguments):
    status = cli.main(list(arguments))
    return status, *capsys.readouterr()


def test_inspect(capsys, tmp_path):
    status, out, _ = _run(capsys, "inspect", str(MODEL_PATH), "--num-heads", "4", "--json")
    assert status == 0
    description = json.loads(out)
    assert (description["width"], description["heads"], description["classes"]) == (64, 4, 10)
    assert description["spans"] == {"audio": 32, "video": 16}
    assert description["methods"].keys() == set(methods.names("fusion"))
    model = fasttta.models.CAVMAE.from_checkpoint(MODEL_PATH, num_heads=4)
    for name, method in description["methods"].items():
        needs = {"source_stats": load_statistics()} if name == "brimpr" else {}
        adapted = fasttta.adapt(model, name, **needs)
        assert method["names"] == list(adapted.tuned)
        assert method["tuned"] == sum(x.numel() for x in adapted.tuned.values())
        adapted.save(tmp_path)
        record = json.loads((tmp_path / "fasttta.json").read_text())
        tensors = load_file(tmp_path / record["state"])
        written = sum(
            x.nbytes for key, x in tensors.items() if not key.startswith(("random", "constant."))
        )
        assert method["delta_bytes"] == written
    status, out, _ = _run(capsys, "inspect", str(MODEL_PATH), "--num-heads", "4")
    assert status == 0
    assert "assumed" not in out
    assert "12 heads (assumed" in inspection.table(
        {**description, "heads": 12, "heads_assumed": True}
    )
    for word in ("32 audio + 16 video", "[B, 1, 32, 32]", "blocks_u.0.attn.q.weight", "12,480"):
        assert word in out


def test_inspect_says_what_cannot_run(tiny_model):
    description = inspection.describe(torch.nn.DataParallel(tiny_model()))
    assert description["found_at"] == "module"
    assert description["methods"]["abpem"]["tuned"] == 468  # its default k gives way to 7 classes
    bare = inspection.describe(tiny_model(depth=(0, 0, 1)))
    assert "encoder_norm" in bare["methods"]["sar"]["impossible"]
    with pytest.raises(ValueError, match="SAR finds nothing to tune in this model"):
        fasttta.adapt(tiny_model(depth=(0, 0, 1)), "sar")
    text = inspection.table(bare)
    assert "sar       not possible" in text


def test_inspect_errors(capsys, tmp_path):
    status, _, err = _run(capsys, "inspect", str(tmp_path / "none"))
    assert status == 2
    assert "no checkpoint at" in err
    Path(tmp_path / "bad").write_bytes(b"nothing")
    status, _, err = _run(capsys, "inspect", str(tmp_path / "bad"))
    assert status == 2
    assert "damaged" in err or "not a plain checkpoint" in err
    status, _, err = _run(capsys, "inspect", str(MODEL_PATH), "--num-heads", "5")
    assert status == 2
    assert "num_heads=5 does not divide the width 64" in err


def test_inspect_emits_a_spec(capsys):
    status, out, _ = _run(capsys, "inspect", str(MODEL_PATH), "--num-heads", "4", "--emit-spec")
    assert status == 0
    spec = eval(out, {"fasttta": fasttta})
    model = fasttta.models.CAVMAE.from_checkpoint(MODEL_PATH, num_heads=4)
    one, other = fasttta.adapt(model, k=3), fasttta.adapt(model, k=3, spec=spec)
    shapes = [list(x.shape) for x in (model.pos_embed_a, model.pos_embed_v)]
    assert [stop - start for start, stop in spec.spans.values()] == [s[1] for s in shapes]
    assert list(one.tuned) == list(other.tuned)


INPUTS = ("--input", "3x12x5", "--input", "3x3x6x6")


def test_inspect_any_fusion_transformer(capsys, tmp_path):
    status, out, _ = _run(capsys, "inspect", "fusions:Joint", *INPUTS, "--emit-spec")
    assert status == 0
    assert eval(out, {"fasttta": fasttta}) == fusions.Joint.spec
    status, out, _ = _run(capsys, "inspect", "fusions:Joint", *INPUTS, "--json")
    description = json.loads(out)
    assert description["spans"] == {"audio": 6, "video": 4}
    for name, method in description["methods"].items():
        if name in ("sar", "brimpr", "rada"):  # what they tune a spec does not say
            needed = {"sar": "encode=", "brimpr": "needed a CAV-MAE", "rada": "class vectors"}
            assert needed[name] in method["impossible"]
            continue
        adapted = fasttta.adapt(fusions.Joint(), name, spec=fusions.Joint.spec)
        assert method["names"] == list(adapted.tuned)
    status, out, _ = _run(capsys, "inspect", "fusions:Joint", *INPUTS)
    assert "fusion.layers.0.self_attn" in out
    assert "6 audio + 4 video" in out
    ids = ("--input", "3x4:int64", "--input", "3x3x6x6")
    status, out, _ = _run(capsys, "inspect", "fusions:HuggingFaceStyle", *ids, "--emit-spec")
    assert 'logits="logits"' in out
    three = ("--input", "3x4x5", "--input", "3x3x7", "--input", "3x2x7", "--logits", "1")
    status, out, _ = _run(capsys, "inspect", "fusions:Three", *three, "--emit-spec")
    assert "logits=1" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fusions:Joint",), ("is not a model that fasttta knows", "--input")),
        (("fusions:Joint", "--emit-spec"), ("is not a model that fasttta knows", "--input")),
        (("fusions:Joint", "--input", "3by4"), ("--input 3by4", "4x1024x128")),
        (("fusions:Joint", "--input", "3x4:int65"), ("--input 3x4:int65",)),
        (("fusions:nothing",), ("fusions:nothing", "package.module:name")),
        (("no_such_module:build",), ("no_such_module", "package.module:name")),
        (("fusions:NAME",), ("fusions:NAME", "package.module:name")),
        (("math:pi",), ("math:pi", "float", "needed a torch.nn.Module")),
    ],
)
def test_inspect_what_is_not_there(capsys, arguments, words):
    status, _, err = _run(capsys, "inspect", *arguments)
    assert status == 2
    assert all(word in err for word in words), err


USER_CODE = """
import os
import torch

NUMBER = 3

def build():
    return torch.nn.Linear(2, 2)

def fails():
    raise RuntimeError("the weights are elsewhere")

def leaves():
    raise SystemExit(3)

def makes_text():
    return "text"

def marks():
    open("called", "w").close()

class Marks:
    def __init__(self):
        marks()

class NeedsWidth(torch.nn.Module):
    def __init__(self, width):
        super().__init__()

class Fails(torch.nn.Module):
    def forward(self, *inputs):
        raise RuntimeError("no such shape")
"""


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    """A folder, the current one, with modules of a user."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user_code.py").write_text(USER_CODE)
    (tmp_path / "user_needs.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "user_raises.py").write_text("raise KeyError('at import')\n")
    (tmp_path / "user_syntax.py").write_text("def x(:\n")
    yield tmp_path
    for name in ("user_code", "user_needs", "user_raises", "user_syntax"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("torch.nn:Linear", ("needs arguments (in_features, out_features)", "takes none")),
        ("user_code:NeedsWidth", ("needs arguments (width)",)),
        ("user_code:fails", ("building the model", "RuntimeError: the weights are elsewhere")),
        ("user_code:leaves", ("building the model", "SystemExit: 3")),
        ("user_code:makes_text", ("makes str", "needed a torch.nn.Module")),
        ("user_code:NUMBER", ("is int", "needed a torch.nn.Module")),
        ("user_code:Marks", ("is a class of other objects",)),
        ("user_code:build.nothing", ("no attribute 'nothing'",)),
        ("user_needs:build", ("importing user_needs", "No module named 'not_installed_anywhere'")),
        ("user_raises:build", ("importing user_raises", "KeyError: 'at import'")),
        ("user_syntax:build", ("importing user_syntax", "SyntaxError")),
        ("os:system", ("is a built-in function, which is not called",)),
        ("os:abort", ("is a built-in function, which is not called",)),
        ("os:", ("needed a checkpoint file or package.module:name",)),
        (":x", ("needed a checkpoint file or package.module:name",)),
        (".a:x", ("needed a checkpoint file or package.module:name",)),
        ("a..b:x", ("needed a checkpoint file or package.module:name",)),
    ],
)
def test_inspect_names_what_makes_no_model(capsys, user_code, model, words):
    before = list(sys.path)
    for more in ((), ("--input", "4x3"), ("--json", "--emit-spec")):
        status, out, err = _run(capsys, "inspect", model, *more)
        assert status == 2
        assert out == ""
        assert err.startswith("fasttta: MODEL=")
        assert len(err.splitlines()) == 1
        assert all(word in err for word in words), err
    assert sys.path == before
    assert not (user_code / "called").exists()


def test_inspect_runs_the_users_model(capsys, user_code):
    shapes = ("--input", "4x3", "--input", "4x5")
    status, _, err = _run(capsys, "inspect", "user_code:Fails", *shapes)
    assert status == 2
    assert "has no attention" in err or "no such shape" in err
    status, _, err = _run(capsys, "inspect", "fusions:Joint", *INPUTS[:3], "3x3x6x6x9")
    assert status == 2
    assert "Joint failed on inputs of 3x12x5, 3x3x6x6x9: RuntimeError" in err
    assert len(err.splitlines()) == 1
    status, _, err = _run(capsys, "inspect", "torch.nn:Identity", "--input", "4x3")
    assert status == 2
    assert "at least two" in err


@pytest.mark.parametrize("how", ["option", "option in front", "environment"])
def test_traceback_is_shown_on_request(capsys, user_code, monkeypatch, how):
    command = ["inspect", "user_code:fails"]
    _, _, err = _run(capsys, *command)
    assert "Traceback" not in err
    assert "--traceback shows where" in err
    if how == "environment":
        monkeypatch.setenv("FASTTTA_TRACEBACK", "1")
    else:
        command.insert(0 if "front" in how else len(command), "--traceback")
    status, _, err = _run(capsys, *command)
    assert status == 2
    assert "in fails" in err
    assert err.splitlines()[-1].startswith("fasttta: MODEL=")
    monkeypatch.setenv("FASTTTA_TRACEBACK", "0")
    assert "Traceback" not in _run(capsys, "inspect", "user_code:fails")[2]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("k=8: needed less"), 2, "fasttta: k=8: needed less"),
        (TypeError("inputs: needed two"), 2, "fasttta: inputs: needed two"),
        (OSError("disk full"), 2, "fasttta: disk full"),
        (ImportError("no numpy"), 2, "fasttta: no numpy"),
        (ValueError(), 2, "fasttta: ValueError"),
        (KeyError("lr"), 1, "fasttta: KeyError: 'lr'; this should not happen, please report it"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_no_error_ends_in_a_traceback(capsys, monkeypatch, error, status, words):
    def fails():
        raise error

    # not the real standard output, which a broken pipe sends nowhere
    monkeypatch.setattr(console, "drop_output", lambda: None)
    monkeypatch.setattr(environment, "diagnose", fails)
    assert cli.main(["doctor"]) == status
    err = capsys.readouterr().err
    assert err.startswith(words)
    assert bool(err) == bool(words)
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["doctor", "inspect", "--help"])
def test_closed_pipe_is_quiet(command):
    more = [str(MODEL_PATH), "--num-heads", "4"] if command == "inspect" else []
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fasttta", command, *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "FASTTTA_NATIVE": "off"},
    )  # fmt: skip
    process.stdout.close()  # before the first line is written
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() in (0, 141)
    assert err == ""


def test_warnings_are_text(capsys, monkeypatch):
    def warns():
        warnings.warn("the state was reset", UserWarning, stacklevel=2)
        return real()

    real = environment.diagnose
    monkeypatch.setattr(environment, "diagnose", warns)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["doctor", "--json"]) == 0
    assert warnings.showwarning is before
    assert capsys.readouterr().err == "warning: the state was reset\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--seeds", "a"), "argument --seeds: 'a': needed integers with commas"),
        (("demo", "--seeds", "1,,2"), "argument --seeds: '1,,2': needed integers with commas"),
        (("study", "--seeds", "0,1.5"), "argument --seeds: '0,1.5': needed integers with commas"),
        (("demo", "--seeds", "99999999999999999999"), "out of range, needed 0 to 2**63 - 1"),
        (("demo", "clip", "--seeds", "-1"), "-1 is out of range"),
        (("study", "--seeds", "1,2,1"), "1 is given twice"),
        (("demo", "--methods", ","), "argument --methods: ',': needed names"),
        (("inspect", "x", "--num-heads", "0"), "argument --num-heads: 0: needed at least 1"),
        (("inspect", "x", "--num-heads", "four"), "'four': needed an integer"),
    ],
)
def test_values_of_options(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_as_json_is_json():
    strings = ["[1  2]", "a\n[3,  4]", 'quote " \\ [5, 6]', "NaN", "[NaN, 1]"]
    data = {
        "strings": strings, "[7,  8]": {"empty": {}, "none": [], "null": None},
        "numbers": [1, 2.5, -3e-9], "odd": [1.0, math.nan, math.inf, -math.inf],
        "nested": [[1, 2], [3, [4]], {"deep": math.nan}], "tuple": (1, 2), "flag": True, 3: "key",
    }  # fmt: skip

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = as_json(data)
    read = json.loads(text, parse_constant=refuse)
    expected = json.loads(json.dumps(data), parse_constant=lambda name: None)
    assert read == expected
    assert read["strings"] == strings
    assert read["odd"] == [1.0, None, None, None]
    assert '"numbers": [1, 2.5, -3e-09]' in text  # one line
