"""Models whose weights are no plain floating point tensors are refused by the module's name."""

from __future__ import annotations

import pytest
import torch
from fusions import HuggingFaceStyle, Joint, Three, build
from lookalikes import HFCLIP, OpenCLIP
from torch import nn
from user_modules import user_module

import fasttta


def dynamic_int8(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def sparse(model):
    weight = next(m for m in model.modules() if isinstance(m, nn.Linear))
    weight.weight = nn.Parameter(weight.weight.detach().to_sparse())
    return model


def integer(model):
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return model


def float8(model):
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn))
    return model


def complex_weight(model):
    norm = next(m for m in model.modules() if isinstance(m, nn.LayerNorm))
    norm.weight = nn.Parameter(norm.weight.detach().to(torch.complex64))
    return model


def quantised_tensor(model):
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.register_buffer("scales", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    return model


class Wrapped(torch.Tensor):
    """As libraries of quantisation have them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


def subclassed(model):
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(Wrapped(linear.weight.detach()), requires_grad=False)
    return model


class FSDPModule(nn.Module):
    pass


def sharded(model):
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    return model


def lazy(model):
    holder, name = next(
        (m, n) for m in model.modules() for n, c in m.named_children() if isinstance(c, nn.Linear)
    )
    setattr(holder, name, nn.LazyLinear(3))
    return model


SPOILERS = {
    dynamic_int8: "quantised weights",
    sparse: "is sparse",
    integer: r"integer weight \(torch.int8\)",
    float8: "stored in torch.float8",
    complex_weight: "is complex",
    quantised_tensor: "is quantised",
    subclassed: "Wrapped, not a plain tensor",
    sharded: "is sharded",
    lazy: "no weights yet",
}


def models(tiny_model):
    ids = torch.randint(3, 90, (3, 8))
    return {
        "joint": (build("joint"), "tent", {"spec": Joint.spec}),
        "three": (build("three"), "read", {"spec": Three.spec}),
        "hugging-face": (build("hugging-face"), "abpem", {"spec": HuggingFaceStyle.spec, "k": 2}),
        "cav-mae": (user_module("cav-mae", tiny_model(), 3), "read", {}),
        "own": (tiny_model(), "read", {}),
        "clip": (HFCLIP(), "tpt", {"classes": ids}),
        "open_clip": (OpenCLIP(), "source", {"classes": ids}),
    }


@pytest.mark.parametrize("name", ["joint", "three", "hugging-face", "cav-mae", "own", "clip",
                                  "open_clip"])  # fmt: skip
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_refused_by_name(spoil, name, tiny_model):
    model, method, options = models(tiny_model)[name]
    if spoil is dynamic_int8 and name == "own":
        model.mlp_head[1] = nn.Linear(12, 7)  # torch.ao leaves subclasses of Linear alone
    spoiled = spoil(model)
    with pytest.raises(ValueError, match=SPOILERS[spoil]) as error:
        fasttta.adapt(spoiled, method, **options)
    modules = [n for n, _ in spoiled.named_modules() if n]
    assert any(n in str(error.value) for n in modules), str(error.value)


@pytest.mark.parametrize("name", ["joint", "cav-mae", "own", "clip"])
def test_meta(name, tiny_model):
    model, method, options = models(tiny_model)[name]
    with pytest.raises(ValueError, match="on the meta device.*hold no values"):
        fasttta.adapt(model.to("meta"), method, **options)


def test_a_buffer_elsewhere():
    model = build("hugging-face")
    model.bias = model.bias.to("meta")
    with pytest.raises(ValueError, match="1 of its .* tensors on the meta device, bias first"):
        fasttta.adapt(model, "tent", spec=HuggingFaceStyle.spec)


def test_several_devices(monkeypatch):
    """Told from the tensors' devices; there is one here."""
    from fasttta.families import refusals

    class Elsewhere:
        def __init__(self, x, device):
            self.x, self.device = x, torch.device(device)

        def __getattr__(self, name):
            return getattr(self.x, name)

    def tensors(model):
        for i, (name, x) in enumerate(model.named_parameters()):
            yield name, Elsewhere(x, f"cuda:{int(i > 3)}"), True

    monkeypatch.setattr(refusals, "_unusable_tensor", lambda *_: None)
    monkeypatch.setattr(refusals, "_tensors", tensors)
    with pytest.raises(ValueError, match=r"several devices: .* on cuda:0, .* on cuda:1; move it"):
        fasttta.adapt(build("joint"), "tent", spec=Joint.spec)


def test_scripted_parts():
    model = build("joint")
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
        model.head = torch.jit.script(model.head)
    with pytest.raises(ValueError, match="head is a TorchScript module"):
        fasttta.adapt(model, "tent", spec=Joint.spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_models_work(dtype):
    model = build("joint")
    adapted = fasttta.adapt(model.to(dtype), "read", spec=Joint.spec)
    assert torch.isfinite(adapted.step(*Joint.batch(3)).logits).all()


def test_integer_parameters_that_are_no_weights():
    model = build("joint")
    model.register_parameter("order", nn.Parameter(torch.arange(3), requires_grad=False))
    fasttta.adapt(model, "read", spec=Joint.spec)(*Joint.batch(3))
