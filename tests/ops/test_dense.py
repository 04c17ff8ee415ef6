"""Tensors that are not plain and dense are refused by name; harmless classes are stripped."""

from __future__ import annotations

import warnings

import clips
import pytest
import torch
from cases import METHODS, flat
from fusions import Joint
from tensor_kinds import Counting, DTensor, Named, Other, Wrapper, fake_tensor
from torch import nn

import fasttta
from fasttta.data import Views
from fasttta.ops.checks import dense


def _quantised(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def _csr(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a beta state
        return x.to_sparse_csr()


REFUSED = {
    "coo": (lambda x: x.to_sparse(), r"a sparse COO tensor.*call \.to_dense\(\)"),
    "csr": (_csr, r"a sparse CSR tensor.*call \.to_dense\(\)"),
    "mkldnn": (lambda x: x.to_mkldnn(), r"an MKLDNN tensor.*call \.to_dense\(\)"),
    "nested": (
        lambda x: torch.nested.nested_tensor([x[0], x[1]]), "a nested tensor.*to_padded_tensor"
    ),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
        "a nested tensor.*to_padded_tensor",
    ),
    "quantised": (_quantised, r"a quantised tensor \(torch.qint8\).*call \.dequantize\(\)"),
    "complex": (lambda x: x + 1j * x, r"complex \(torch.complex64\).*\.real"),
    "fake": (fake_tensor, r"a FakeTensor \(torch\._subclasses"),
    "wrapper": (Wrapper, r"a Wrapper \(.*give its values"),
    "DTensor": (DTensor, r"a DTensor \(.*call \.full_tensor\(\)"),
    "operations": (
        lambda x: x.as_subclass(Counting), r"a Counting .*\.as_subclass\(torch\.Tensor\)"
    ),
}  # fmt: skip
STRIPPED = {
    "parameter": lambda x: nn.Parameter(x.clone()),
    "subclass": lambda x: x.as_subclass(Named),
    "another": lambda x: x.as_subclass(Other),
    "negative view": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.fixture
def kinds(tiny_model, tiny_batch):
    """The three kinds of adapted objects (and a specified model), each with inputs."""
    torch.manual_seed(0)
    clip = clips.tiny_clip()
    images = torch.rand(2, 3, 24, 24)
    return {
        "fusion": (fasttta.adapt(tiny_model(), "read"), tiny_batch()),
        "specified": (fasttta.adapt(Joint().eval(), "read", spec=Joint.spec), Joint.batch(3)),
        "images": (clips.adapt(clip, "tpt"), (images,)),
        "head": (
            fasttta.adapt(clip, "rada", loss="entropy", classes=clips.tiny_ids(), heads=2),
            (images,),
        ),
    }


def _tensors(adapted):
    """What a step could change, copied."""
    tensors = {f"tuned.{n}": x for n, x in adapted.tuned.items()}
    if hasattr(adapted, "_state"):
        tensors |= {n: x.clone() for n, x in adapted._state.tensors().items()}
    return tensors


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[n]) for n, x in a.items())


def _calls(adapted):
    return {
        "call": adapted, "step": adapted.step, "predict": adapted.predict,
        "stream": lambda *inputs: list(adapted.stream([inputs])),
        "ahead": lambda *inputs: list(adapted.stream([inputs], encode_batch=8)),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per")
@pytest.mark.parametrize("kind", ["fusion", "specified", "images", "head"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused(kinds, kind, what):
    adapted, inputs = kinds[kind]
    change, message = REFUSED[what]
    changed = change(inputs[0][:, 0] if what == "csr" else inputs[0])
    before = _tensors(adapted)
    for name, call in _calls(adapted).items():
        with pytest.raises(TypeError, match=f"(audio|images?) is {message}"):
            call(changed, *inputs[1:])
        assert _equal(before, _tensors(adapted)), name


@pytest.mark.parametrize("kind", ["fusion", "specified", "images", "head"])
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.functionalize])
def test_transforms_are_refused(kinds, kind, transform):
    adapted, inputs = kinds[kind]
    groups = tuple(x[None] for x in inputs) if transform is torch.func.vmap else inputs
    with pytest.raises(TypeError, match=r"is inside torch\.func.*call it outside"):
        transform(adapted.predict)(*groups)


@pytest.mark.parametrize("kind", ["fusion", "specified", "images", "head"])
@pytest.mark.parametrize("what", STRIPPED)
def test_stripped(kinds, kind, what):
    adapted, inputs = kinds[kind]
    expected = list(flat(adapted.step(*inputs)))
    adapted.reset()
    changed = [STRIPPED[what](x) for x in inputs]
    returned = list(flat(adapted.step(*changed)))
    assert all(type(x) is torch.Tensor and not x.requires_grad for x in returned)
    assert all(torch.equal(x, y) for x, y in zip(expected, returned, strict=True))
    assert type(adapted.predict(*changed)) is torch.Tensor


@pytest.mark.parametrize("method", ["eata", "sar", "abpem", "brimpr", "source"])
def test_states_never_hold_a_class_of_the_caller(tiny_model, tiny_batch, method):
    adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
    plain = fasttta.adapt(tiny_model(), method, **METHODS[method])
    for i, cls in enumerate((Named, Other, Named)):
        batch = tiny_batch(seed=i)
        result = adapted.step(*(x.as_subclass(cls) for x in batch), trace=True)
        plain.step(*batch, trace=True)
        tensors = [*flat(result), *result.trace.values(), *result.grads.values()]
        tensors += adapted._state.method.values()
        assert {type(x) for x in tensors} == {torch.Tensor}
    assert _equal(_tensors(adapted), _tensors(plain))


def test_loaders_of_what_is_collected(tiny_model, tiny_batch):
    audio, video = tiny_batch()
    for collect in (fasttta.collect_stats, fasttta.collect_fisher):
        with pytest.raises(TypeError, match="video is a sparse COO tensor"):
            collect(tiny_model(), [(audio, video.to_sparse())], n=5)


def test_other_arguments(tiny_model, tiny_batch):
    batch = tiny_batch()
    adapted = fasttta.adapt(tiny_model(), "brimpr", **METHODS["brimpr"])
    keep = torch.arange(3).expand(5, 3), torch.arange(2).expand(5, 2)
    with pytest.raises(TypeError, match="keep of audio is a sparse COO tensor"):
        adapted.step(*batch, keep=(keep[0].to_sparse(), keep[1]))
    views = clips.tiny_views(4)
    parts = {"base": views.base, "mix": views.mix, "weight": views.weight}
    for name, x in parts.items():
        with pytest.raises(TypeError, match=f"{name} is a sparse COO tensor"):
            Views(**parts | {name: x.to_sparse()})
        assert type(getattr(Views(**parts | {name: x.as_subclass(Named)}), name)) is torch.Tensor
    ttc = clips.adapt(clips.tiny_clip(), "ttc")
    image = torch.rand(2, 3, 24, 24)
    for noise, error, match in (
        (image.to_sparse(), TypeError, "noise is a sparse COO tensor"),
        (torch.rand(3, 3, 24, 24), ValueError, r"noise must be \[2, 3, 24, 24\]"),
        (torch.full((1, 3, 24, 24), torch.nan), ValueError, "noise holds non-finite"),
    ):
        with pytest.raises(error, match=match):
            ttc.step(image, noise=noise)


def test_memory_is_shared_and_gradients_stay():
    x = nn.Parameter(torch.randn(3))
    assert dense("x", x).data_ptr() == x.data_ptr()
    assert dense("x", x).requires_grad
    y = torch.randn(3)
    assert dense("y", y) is y


def test_marked_images_of_torchvision():
    """Their class says what they are of, and has operations that keep it."""
    cls = type("Image", (Counting,), {"__module__": "torchvision.tv_tensors._image"})
    assert type(dense("image", torch.rand(3, 4, 4).as_subclass(cls))) is torch.Tensor
