"""fasttta inspect and fasttta doctor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fusions
import pytest
import torch
from safetensors.torch import load_file

import fasttta
from fasttta import cli, environment, inspection, methods
from fasttta.demo.digits import MODEL_PATH, load_statistics
from fasttta.ops import schema


def _run(capsys, *arguments):
    status = cli.main(list(arguments))
    return status, *capsys.readouterr()


def test_doctor(capsys):
    status, out, _ = _run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["fasttta"] == fasttta.__version__
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or (
        found["packages"]["torch"] == torch.__version__
    )
    assert bool(found["cuda"]["gpus"]) == torch.cuda.is_available()
    forward = {name for name in schema.SCHEMAS if not name.endswith("_backward")}
    assert found["operations"].keys() == forward
    # what it says of a backend is what asking for it says
    q = torch.randn(1, 1, 4, 2)
    why_not = found["operations"]["score_moments"]["cpp"]
    with pytest.raises(ValueError, match=re.escape(why_not)):
        fasttta.functional.score_moments(q, q, (2, 2), backend="cpp")
    built = found["native"]["library"] is not None
    assert found["operations"]["entropy"]["cpu"] == ("cpp" if built else "composite")
    assert (found["operations"]["entropy"]["cpp"] == "live") == built
    status, out, _ = _run(capsys, "doctor")
    assert status == 0
    for word in (*forward, found["processor"]["name"], "torch", "engine", "GPU"):
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
    found = environment.diagnose()
    assert found["packages"]["no-such-package"] is None
    assert "no-such-package missing" in environment.table(found)


def test_inspect(capsys, tmp_path):
    status, out, _ = _run(capsys, "inspect", str(MODEL_PATH), "--num-heads", "4", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["width"], found["heads"], found["classes"]) == (64, 4, 10)
    assert found["spans"] == {"audio": 32, "video": 16}
    assert found["methods"].keys() == set(methods.names("fusion"))
    model = fasttta.models.CAVMAE.from_checkpoint(MODEL_PATH, num_heads=4)
    for name, method in found["methods"].items():
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
    assert "12 heads (assumed" in inspection.table({**found, "heads": 12, "heads_assumed": True})
    for word in ("32 audio + 16 video", "[B, 1, 32, 32]", "blocks_u.0.attn.q.weight", "12,480"):
        assert word in out


def test_inspect_says_what_cannot_run(tiny_model):
    found = inspection.describe(torch.nn.DataParallel(tiny_model()))
    assert found["found_at"] == "module"
    assert "k=8: needed at most the model's 7 classes" in found["methods"]["abpem"]["impossible"]
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
    found = json.loads(out)
    assert found["spans"] == {"audio": 6, "video": 4}
    for name, method in found["methods"].items():
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
