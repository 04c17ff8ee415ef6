"""Weights, hooks and classes of the wrapped model that change after ``adapt``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import same, snapshot
from clips import tiny_clip, tiny_ids, tiny_views
from fusions import FUSIONS, build
from lookalikes import HFCLIP, OpenCLIP
from torch import nn
from user_modules import user_logits, user_module

import fasttta
from fasttta.engine import model_watch


def made(name, tiny_model, method="read", **options):
    """An adapted model, the wrapped one and a call."""
    if name in FUSIONS:
        model, batch = build(name), FUSIONS[name].batch(4)
        adapted = fasttta.adapt(model, method, spec=FUSIONS[name].spec, **options)
        return adapted, model, lambda: adapted.step(*batch)
    if name in ("user", "own"):
        g = torch.Generator().manual_seed(1)
        batch = torch.randn(4, 6, 8, generator=g), torch.randn(4, 3, 6, 6, generator=g)
        model = user_module("cav-mae", tiny_model(), 3) if name == "user" else tiny_model()
        adapted = fasttta.adapt(model, method, **options)
        return adapted, model, lambda: adapted.step(*batch)
    model = {"clip": HFCLIP, "open_clip": OpenCLIP, "own clip": tiny_clip}[name]()
    adapted = fasttta.adapt(model, "tpt", classes=tiny_ids(), views=6, select=0.5, **options)
    return adapted, model, lambda: adapted.step(views=tiny_views())


NAMES = ("joint", "three", "hugging-face", "user", "own", "clip", "open_clip", "own clip")


def load(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(other.state_dict())


def assign(model):
    state = {name: x.clone() * 1.1 for name, x in model.state_dict().items()
             if x.is_floating_point()}  # fmt: skip
    model.load_state_dict(state, strict=False, assign=True)


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def last(model):
    return list(model.named_parameters())[-1]


def set_data(model):
    parameter = last(model)[1]
    parameter.data = parameter.data * 2


def replace_one(model):
    name, parameter = last(model)
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(parameter.detach() * 2))


def replace_layer(model):
    path = last(model)[0].rpartition(".")[0]
    outer, _, leaf = path.rpartition(".")
    new = copy.deepcopy(model.get_submodule(path))
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(2)
    model.get_submodule(outer)._modules[leaf] = new


def one_value(model):
    with torch.no_grad():
        last(model)[1].view(-1)[0] += 1


CHANGES = (load, assign, train, set_data, replace_one, replace_layer, one_value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("when", ["before the first batch", "later"])
def test_changed_weights_are_named(name, change, when, tiny_model):
    adapted, model, call = made(name, tiny_model)
    if when == "later":
        call()
    before = snapshot(adapted)
    change(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"of the wrapped model changed after fasttta.adapt"):
            call()
    with pytest.raises(ValueError, match=r"changed after fasttta.adapt; adapt the model as it is"):
        adapted.unwrap(merge=True) if "clip" not in name else adapted.predict(views=tiny_views())
    after = snapshot(adapted)
    assert all(torch.equal(before[key], x) for key, x in after.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_changed_tensor_is_named(name, tiny_model):
    _, model, call = made(name, tiny_model)
    one_value(model)
    with pytest.raises(ValueError, match=last(model)[0]):
        call()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["type and back", "wider", "mode", "gradients", "copied"])
def test_what_changes_no_results(name, where, tiny_model):
    adapted, model, call = made(name, tiny_model)
    _, _, plain = made(name, tiny_model)
    assert same(call(), plain())
    if where == "type and back":
        model.double().float()
    elif where == "wider":
        model.double()
    elif where == "mode":
        model.train()
    elif where == "gradients":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
    else:
        copy.deepcopy(model).double()
    for _ in range(2):
        assert same(call(), plain())
    assert copy.deepcopy(adapted) is not adapted


def test_half_is_a_move(tiny_model):
    """The model in half precision has rounded weights; what adapts keeps those it was given."""
    _, model, call = made("own", tiny_model)
    _, _, plain = made("own", tiny_model)
    assert same(call(), plain())
    model.half()
    assert same(call(), plain())


@pytest.mark.parametrize("name", ["user", "joint", "own clip"])
def test_writes_that_nothing_counts(name, tiny_model):
    """Through ``.data``, numpy or another tensor of the same memory: seen by reading all values."""
    for write in (
        lambda x: x.data.mul_(2),
        lambda x: x.detach().numpy().__imul__(2),
        lambda x: torch.from_numpy(x.detach().numpy()).view(-1)[-1:].add_(1e-3),
    ):
        _, model, call = made(name, tiny_model, verify_model="always")
        call()
        call()
        write(last(model)[1])
        with pytest.raises(ValueError, match=rf"{last(model)[0]} of the wrapped model changed"):
            call()
        _, model, call = made(name, tiny_model)  # documented
        write(last(model)[1])
        call()


@pytest.mark.parametrize("name", ["joint", "user"])
def test_never(name, tiny_model):
    _, model, call = made(name, tiny_model, verify_model="never")
    call()
    one_value(model)
    call()


@pytest.mark.parametrize("mode", ["always", "first", "never"])
def test_the_mode_goes_with_copies(mode, tiny_model):
    adapted, model, _ = made("own", tiny_model, verify_model=mode)
    g = torch.Generator().manual_seed(1)
    batch = torch.randn(4, 6, 8, generator=g), torch.randn(4, 3, 6, 6, generator=g)
    for again in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        again.step(*batch)
        inner = again.unwrap()
        assert inner is not model
        last(inner)[1].data.mul_(2)
        if mode == "always":
            with pytest.raises(ValueError, match="changed after"):
                again.step(*batch)
        else:
            again.step(*batch)
    adapted.step(*batch)  # the original's model is as it was


def test_an_unknown_mode(tiny_model):
    for name in ("own", "own clip"):
        with pytest.raises(ValueError, match="verify_model='sometimes' is unknown; known: 'first'"):
            made(name, tiny_model, verify_model="sometimes")


# -- hooks, classes, patches


def ramp(_module, _inputs, output):
    return output + torch.linspace(0, 2, output.shape[-1])


@pytest.mark.parametrize("name", NAMES)
def test_hooks_registered_after(name, tiny_model):
    adapted, model, call = made(name, tiny_model)
    call()
    place = {
        "three": "head", "joint": "head", "hugging-face": "classifier", "user": "norm",
        "own": "norm", "clip": "vision_model.post_layernorm",
    }.get(name, "visual.ln_post")  # fmt: skip
    before = snapshot(adapted)
    handle = model.get_submodule(place).register_forward_hook(ramp)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"hooks of the wrapped model.*{place}"):
            call()
    after = snapshot(adapted)
    assert all(torch.equal(before[key], x) for key, x in after.items())
    handle.remove()
    call()
    seen = []
    model.get_submodule(place).register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        call()
    assert len(seen) <= 2  # one comparison


@pytest.mark.parametrize("name", ["user", "own", "three"])
def test_classes_and_forwards_changed_after(name, tiny_model):
    for change, words in (("class", "class of a module"), ("forward", "forward of .* replaced")):
        _, model, call = made(name, tiny_model)
        call()
        module = model.get_submodule("head" if name == "three" else "mlp_head.1")
        plain = type(module)
        if change == "class":
            forward = lambda self, *x, plain=plain: 2 + plain.forward(self, *x)  # noqa: E731
            module.__class__ = type("Louder", (plain,), {"forward": forward})
        else:
            module.forward = lambda x, plain=module.forward: 2 + plain(x)
        with pytest.raises(ValueError, match=words):
            call()


def test_parametrised_after(tiny_model):
    _, model, call = made("three", tiny_model)
    call()
    nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(ValueError, match=r"head.* (is gone|is new): the model changed after"):
        call()


# -- tensors that change without effect


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build("three")
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("factor", torch.ones(()))

    def forward(self, *inputs):
        self.calls += 1
        return self.inner(*inputs)[1] * self.factor


def test_buffers():
    """A counter is compared once and then let be; a buffer that results depend on is not."""
    model, batch = Counting().eval(), FUSIONS["three"].batch(3)
    spec = fasttta.ModelSpec("inner.attn", FUSIONS["three"].spec.spans, "qkv")
    adapted = fasttta.adapt(model, "read", spec=spec)
    verified, verify = [], adapted._family.verify
    adapted._family.verify = lambda x: verified.append(1) or verify(x)
    for _ in range(4):
        model(*batch)
        adapted.step(*batch)
    assert len(verified) == 1  # the first batch, for which the counter had changed
    model.factor.mul_(2)
    with pytest.raises(ValueError, match="buffer factor of the wrapped model changed"):
        adapted.step(*batch)
    model.factor.div_(2)
    adapted.step(*batch)


@pytest.mark.parametrize("flavour", ["read", "abpem"])
def test_official_modules_may_run(golden, golden_model, flavour):
    """Their first forward makes q, k, v views of the packed weights: storages of parameters change,
    what they compute does not."""
    module = user_module(flavour, golden_model, 4)
    batch = tuple(x[:1].float() for x in golden.batch(0))
    adapted = fasttta.adapt(module, "read")
    plain = fasttta.adapt(golden_model, "read")
    for _ in range(2):
        with torch.no_grad():
            user_logits(module, batch)
        assert torch.equal(adapted.step(*batch).logits, plain.step(*batch).logits)
    always = fasttta.adapt(user_module(flavour, golden_model, 4), "read", verify_model="always")
    with torch.no_grad():
        user_logits(always.unwrap(), batch)
    always.step(*batch)
    with torch.no_grad():
        module.blocks_u[0].attn.qkv.weight.mul_(1.5)
    with pytest.raises(ValueError, match="blocks_u.0.attn.qkv.weight of the wrapped model changed"):
        adapted.step(*batch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["first", "always"])
def test_the_same_weights_again(name, mode, tiny_model):
    """Values that are written over with themselves: a checkpoint that is loaded twice, the
    broadcast of DistributedDataParallel."""
    _, model, call = made(name, tiny_model, verify_model=mode)
    _, _, plain = made(name, tiny_model)
    assert same(call(), plain())
    state = copy.deepcopy(model.state_dict())
    versions = [x._version for x in model.parameters()]
    model.load_state_dict(state)
    assert all(x._version > v for x, v in zip(model.parameters(), versions, strict=True))
    assert same(call(), plain())
    with torch.no_grad():
        last(model)[1].view(-1)[-1] += 1
    with pytest.raises(ValueError, match=last(model)[0]):
        call()


class Lazy(nn.Module):
    """Registers a buffer when it first runs, as caches of position codes do."""

    def __init__(self):
        super().__init__()
        self.inner = build("three")

    def forward(self, *inputs):
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.ones(()), persistent=False)
        return self.inner(*inputs)[1] * self.table


def test_buffers_that_a_forward_registers():
    model, batch = Lazy().eval(), FUSIONS["three"].batch(3)
    spec = fasttta.ModelSpec("inner.attn", FUSIONS["three"].spec.spans, "qkv")
    adapted, twin = (fasttta.adapt(m, "read", spec=spec) for m in (model, copy.deepcopy(model)))
    for _ in range(3):
        assert same(adapted.step(*batch), twin.step(*batch))
        model(*batch)
    assert "table" in dict(model.named_buffers())
    model.table.mul_(2)
    with pytest.raises(ValueError, match="buffer table of the wrapped model changed"):
        adapted.step(*batch)


def test_weights_are_not_read_again_for_a_counter(monkeypatch):
    """Checksums are taken when the model is wrapped, then of what was written to only."""
    model, batch = Counting().eval(), FUSIONS["three"].batch(3)
    spec = fasttta.ModelSpec("inner.attn", FUSIONS["three"].spec.spans, "qkv")
    adapted = fasttta.adapt(model, "read", spec=spec)
    read = []
    taken = model_watch.byte_sums
    monkeypatch.setattr(model_watch, "byte_sums", lambda x: read.extend(x) or taken(x))
    for _ in range(3):
        model(*batch)
        adapted.step(*batch)
    assert read
    assert all(x is model.calls for x in read)
