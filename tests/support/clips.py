"""Small CLIPs and golden vectors for the tests of vision-language methods."""

from __future__ import annotations

import json

import goldens
import torch
from safetensors.torch import load_file

import fasttta

SOT, EOT = 98, 99


def tiny_clip(seed: int = 0, resnet: bool = False, **changes):
    """A CLIP of odd sizes: 24-pixel images, 3 x 3 patches (64 pixels, 2 x 2 for ResNets), width
    24, 100 tokens, context 16."""
    from fasttta.models import CLIP

    torch.manual_seed(seed)
    vision = {"resolution": 24, "patch": 8, "dim": 24, "depth": 3, "heads": 3, "hidden": 40}
    if resnet:
        vision = {"resolution": 64, "width": 4, "layers": (1, 1, 1, 1), "heads": 2}
    text = {
        "dim": 20, "depth": 3, "heads": 2, "hidden": 36, "context_length": 16, "vocabulary": 100,
    }  # fmt: skip
    model = CLIP(12, {**vision, **changes.pop("vision", {})}, text, **changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(module.weight, 1, 0.1)
    model.logit_scale.data.fill_(3.0)
    return model.eval().requires_grad_(False)


def tiny_resnet():
    """``tiny_clip`` with a ResNet as its image tower."""
    return tiny_clip(resnet=True)


def tiny_ids(classes: int = 6, prompt: int = 4, length: int = 14, seed: int = 1) -> torch.Tensor:
    """Token ids [classes, length]: SOT, the same ``prompt`` tokens, 1 to 6 of each class, EOT."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(classes, length, dtype=torch.int64)
    for i, row in enumerate(rows):
        length_of_name = 1 + (i * 5 + 2) % 6
        row[0], row[1 : 1 + prompt] = SOT, torch.arange(5, 5 + prompt)
        name = torch.randint(20, 90, (length_of_name,), generator=generator)
        row[1 + prompt : 1 + prompt + length_of_name] = name
        row[1 + prompt + length_of_name] = EOT
    return rows


def tiny_views(n: int = 6, size: int = 24, seed: int = 2, dtype=torch.float32, region=False):
    """Views of one image of random pixels, smoothed so that attention has something to see."""
    from fasttta.data import Views

    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(n, 3, size // 4, size // 4, generator=generator, dtype=torch.float64)
    base = torch.nn.functional.interpolate(base, (size, size), mode="bicubic").clamp(0, 1).to(dtype)
    mix = torch.rand(n, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    mix[0] = base[0]
    weight = torch.rand(n, generator=generator, dtype=torch.float64)
    weight[0] = 1
    regions = None
    if region:
        regions = torch.randint(0, 3, (n, size, size), generator=generator, dtype=torch.uint8)
    return Views(base, mix, weight, regions)


class ClipGolden:
    """Golden vectors of a tower kind, "vit" or "rn"; tests that ask for them are skipped where
    they are missing."""

    def __init__(self, kind: str) -> None:
        parts = ("model", "inputs", "expected_f32", "expected_f64")
        files = [f"atpt/{kind}_{part}.safetensors" for part in parts]
        self.root = goldens.require("atpt/golden.json", *files) / "atpt"
        self.kind = kind
        config = json.loads((self.root / "golden.json").read_text())
        self.config, self.differences = config[kind], {}
        for name, entries in config.items():
            if name.startswith(f"{kind}_f32_vs_f64"):
                self.differences = entries
        self.inputs = self.load("inputs")
        self.expected = {"fp32": self.load("expected_f32"), "fp64": self.load("expected_f64")}

    def load(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / f"{self.kind}_{name}.safetensors")

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = self.load("model")
        rows, values = state.pop("token_embedding.rows"), state.pop("token_embedding.values")
        embedding = torch.zeros(49408, values.shape[1])
        embedding[rows] = values
        return state | {"token_embedding.weight": embedding}

    def views(self, region: torch.Tensor | None = None, device="cpu"):
        from fasttta.data import Views

        base = self.inputs["bases_u8"].float() / 255
        views = Views(base, self.inputs["mixes"], self.inputs["betas"], region)
        return views.to(device)


METHODS = {
    "source": {},
    "tpt": {"views": 8, "select": 0.3},
    "c-tpt": {"views": 8, "select": 0.3},
    "r-tpt": {"views": 8, "select": 0.3},
    "a-tpt": {"views": 8, "select": 0.3},
    "mta": {"views": 8},
    "ttc": {},
}
TUNING = ("tpt", "c-tpt", "r-tpt", "a-tpt")
# "up to 5x float noise": logits of the tiny model are below 21
NOISE = {"rtol": 0, "atol": 2e-5}


def adapt(model, method, **options):
    """The model adapted with the tiny classes and the method's options for tests."""
    return fasttta.adapt(model, method, classes=tiny_ids(), **{**METHODS[method], **options})


def image(seed: int, height: int = 31, width: int = 40) -> torch.Tensor:
    """A random image [3, height, width] in [0, 1]."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def same(a, b, **tolerance):
    """Asserts that two results agree, bit for bit without a tolerance."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    assert torch.allclose(a.logits, b.logits, **tolerance)
    assert torch.allclose(a.logits_before, b.logits_before, **tolerance)
    for x, y in ((a.losses, b.losses), (a.stats, b.stats)):
        assert x.keys() == y.keys()
        for name in x:
            assert torch.allclose(x[name].double(), y[name].double(), **tolerance), name


def near(value, expected, tolerance, what=""):
    """Asserts that the largest difference of two tensors is within the tolerance."""
    assert value.shape == expected.shape, f"{what}: {value.shape}, needed {expected.shape}"
    error = (value.double().cpu() - expected.double()).abs().max().item()
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.2e}"
