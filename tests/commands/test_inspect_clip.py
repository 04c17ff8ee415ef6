"""fasttta inspect on CLIPs, and what is refused because it only resembles one."""

from __future__ import annotations

import json

import pytest
import torch
from clips import tiny_clip, tiny_ids, tiny_resnet
from dual_encoders import Align, ChineseCLIP, OpenSiglip, Other, Siglip, tower
from lookalikes import CustomTextCLIP, OpenCLIP
from safetensors.torch import load_file, save_file
from torch import nn

import fasttta
from fasttta import cli, methods
from fasttta.commands import inspect as inspection


def _run(capsys, *arguments):
    status = cli.main(["inspect", *arguments])
    return status, *capsys.readouterr()


def test_a_checkpoint_file(capsys, tmp_path):
    """What is said of each method is what adapting with it does."""
    model = tiny_clip(vision={"dim": 64, "heads": 1})
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    status, out, _ = _run(capsys, str(tmp_path / "clip.safetensors"), "--json")
    assert status == 0
    description = json.loads(out)
    assert description["family"] == "fasttta.models.CLIP"
    assert description["image"] == {
        "kind": "ViT", "resolution": 24, "grid": 3, "patch": 8, "width": 64, "blocks": 3,
        "heads": 1,
    }  # fmt: skip
    assert description["text"]["context"] == 16
    assert description["joint"] == 12
    assert description["heads_assumed"]
    assert list(description["methods"]) == methods.names("vision-language")
    rada = description["methods"].pop("rada")  # test_rada_models has one that it fits
    assert rada == {"impossible": "with its default options: heads=8 does not divide dim=12"}
    for name, method in description["methods"].items():
        adapted = fasttta.adapt(model, name, classes=tiny_ids())
        assert method["names"] == list(adapted.tuned)
        assert method["tuned"] == sum(x.numel() for x in adapted.tuned.values())
        adapted.save(tmp_path)
        record = json.loads((tmp_path / "fasttta.json").read_text())
        tensors = load_file(tmp_path / record["state"])
        assert method["delta_bytes"] == tensors["prompt"].nbytes
        assert tensors.keys() == {"classes", "prompt"}
    status, out, _ = _run(capsys, str(tmp_path / "clip.safetensors"))
    for word in ("24 x 24 pixels, 3 x 3 patches of 8", "in [0, 1]", "normalised inside",
                 "0.4815 0.4578 0.4082", "prompt [4, 20]", "assumed: 64 channels"):  # fmt: skip
        assert word in out


def test_modules(capsys):
    status, out, _ = _run(capsys, "lookalikes:HFCLIP", "--json")
    assert status == 0
    description = json.loads(out)
    assert description["family"] == "Hugging Face CLIPModel"
    assert (description["image"]["heads"], description["text"]["heads"]) == (3, 2)
    assert not description["heads_assumed"]
    assert inspection.describe(OpenCLIP())["family"] == "open_clip or OpenAI CLIP"
    assert inspection.describe(CustomTextCLIP().double())["methods"]["tpt"]["delta_bytes"] == 640


def test_what_a_resnet_cannot(capsys):
    status, out, _ = _run(capsys, "clips:tiny_resnet")
    assert status == 0
    assert "ResNet, 64 x 64 pixels, last map 2 x 2, layers 1, 1, 1, 1" in out
    for word in ("Grad-CAM", "'code', 'paper' and 'gar'", "not possible on a ResNet"):
        assert word in out
    entries = inspection.describe(tiny_resnet())["methods"]
    assert "note" in entries["a-tpt"]
    assert "note" not in entries["tpt"]
    assert "note" not in inspection.describe(tiny_clip())["methods"]["a-tpt"]


def test_what_cannot_run():
    short = tiny_clip(vision={"depth": 1})
    entries = inspection.describe(short)["methods"]
    assert "at least two blocks, found 1" in entries["a-tpt"]["impossible"]
    assert "impossible" not in entries["r-tpt"]
    assert "a-tpt     not possible" in inspection.table(inspection.describe(short))
    with pytest.raises(ValueError, match="at least two blocks, found 1"):
        fasttta.adapt(short, "a-tpt", classes=tiny_ids())
    narrow = tiny_clip()
    narrow.positional_embedding = nn.Parameter(narrow.positional_embedding[:6])
    entries = inspection.describe(narrow)["methods"]
    assert "has 4 words, the context 6 tokens" in entries["tpt"]["impossible"]
    assert "impossible" not in entries["mta"]


def test_errors(capsys, tmp_path):
    save_file(tiny_clip().state_dict(), tmp_path / "clip.safetensors")
    torch.save(3, tmp_path / "number.pt")
    torch.save({"visual.conv1.weight": torch.zeros(2, 3, 4, 4)}, tmp_path / "part.pt")
    for arguments, words in (
        ((str(tmp_path / "clip.safetensors"), "--num-heads", "2"), ("64 channels",)),
        ((str(tmp_path / "part.pt"),), ("not a CLIP checkpoint", "token_embedding.weight")),
        (("clips:tiny_resnet", "--emit-spec"), ("needs no ModelSpec",)),
        (("dual_encoders:Siglip",), ("Siglip is a dual encoder", "logit_bias")),
        (("dual_encoders:Siglip", "--emit-spec"), ("Siglip is a dual encoder",)),
        (
            (str(tmp_path / "number.pt"),),
            ("number.pt' holds an object of type int, needed",),
        ),
    ):
        status, _, err = _run(capsys, *arguments)
        assert status == 2
        for word in words:
            assert word in err


@pytest.mark.parametrize(
    ("build", "error", "differences"),
    [
        (Siglip, TypeError, ("logit_bias (a sigmoid loss, as SigLIP has)", "pooled by attention",
                             "no text_projection and no visual_projection")),
        (Align, TypeError, ("a temperature (as ALIGN has)", "word_embeddings", "no logit_scale",
                            "a convolutional image tower", "no visual_projection")),
        (OpenSiglip, ValueError, ("looks like open_clip", "trunk", "logit_bias")),
        (ChineseCLIP, ValueError, ("looks like Hugging Face CLIPModel", "word_embeddings")),
        (Other, TypeError, ("(image_encoder, text_encoder)", "no logit_scale")),
    ],
)  # fmt: skip
def test_other_dual_encoders_are_refused(build, error, differences):
    """With what was found and what was needed, by adapt and by inspect."""
    for call in (
        lambda model: fasttta.adapt(model, classes=tiny_ids()),
        lambda model: fasttta.adapt(nn.DataParallel(model), "tpt", classes=tiny_ids()),
        inspection.describe,
    ):
        with pytest.raises(error) as caught:
            call(build())
        message = str(caught.value)
        for words in (build.__name__, *differences, "needed CLIP's architecture"):
            assert words in message


def test_fusion_models_are_no_dual_encoders(tiny_model):
    """Their own message, which tells of ModelSpec, stays."""
    model = tiny_model()
    assert fasttta.adapt(model, "read").method == "read"
    with pytest.raises(TypeError, match="ModelSpec"):
        fasttta.adapt(nn.Sequential(nn.Linear(2, 2)))
    # also of one whose towers have a dual encoder's names, and which may fuse what they give
    named = tower(vision_model=nn.Linear(2, 2), text_model=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="dual encoder.*meet in a fusion transformer.*ModelSpec"):
        fasttta.adapt(named)
