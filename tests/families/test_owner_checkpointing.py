"""Gradient checkpointing in the user's forward: the gradients without it, or a refusal."""

from __future__ import annotations

import pytest
import torch
from fusions import Joint, Three, build
from torch import nn
from torch.utils.checkpoint import checkpoint

import fasttta

SPANS = {"a": (0, 6), "v": (6, 10)}


class Model(nn.Module):
    """Two stems, two transformer layers and a head; ``where`` is computed again in the backward."""

    def __init__(self, where=None, reentrant=False):
        super().__init__()
        torch.manual_seed(1)
        self.where, self.reentrant = where, reentrant
        self.a, self.v = nn.Linear(5, 16), nn.Linear(7, 16)
        self.e = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.f = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 6)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.4)

    def run(self, name, part, *x):
        if self.where != name:
            return part(*x)
        return checkpoint(part, *x, use_reentrant=self.reentrant)

    def both(self, a, v):
        x = torch.cat((self.a(a), self.run("encoder", self.e, self.v(v))), 1)
        return self.head(self.run("fusion", self.f, x).mean(1))

    def attend(self, a, v):
        return self.run("attention", self.both, a, v)

    def forward(self, a, v):
        return self.run("all", self.attend, a, v)


class Flagged(Model):
    """Checkpoints where a flag says so, whatever the mode, as timm's models do."""

    def __init__(self, on, reentrant=False):
        super().__init__("fusion", reentrant)
        self.grad_checkpointing = on

    def run(self, name, part, *x):
        return super().run(name, part, *x) if self.grad_checkpointing else part(*x)


SPEC = fasttta.ModelSpec(fusion="f.self_attn", spans=SPANS)


def batch(n=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, 6, 5, generator=g, dtype=dtype),
        torch.randn(n, 4, 7, generator=g, dtype=dtype),
    )


def gradients(model, method):
    options = {"k": 2, "window": 2} if method == "abpem" else {}
    adapted = fasttta.adapt(model.eval().double(), method, spec=SPEC, **options)
    steps = [adapted.step(*batch(), trace=True) for _ in range(2)]
    return steps[0].grads | {f"second {n}": g for n, g in steps[1].grads.items()}


def sar_gradients(model):
    """SAR tunes inside the encoders that the spec names, and takes two gradients a step."""
    spec = fasttta.ModelSpec("f.self_attn", SPANS, encode=("a", "e"))
    adapted = fasttta.adapt(model.eval().double(), "sar", spec=spec, e_margin=3.0)
    return adapted.step(*batch(), trace=True).grads


def outcome(model, method):
    """Gradients, or why they are refused."""
    try:
        return sar_gradients(model) if method == "sar" else gradients(model, method)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("method", ["read", "abpem", "tent", "sar"])
@pytest.mark.parametrize("where", ["fusion", "encoder", "all"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_or_refusal(method, where, reentrant):
    """Whatever is accepted has the gradients of the same model without checkpoints."""
    right, result = outcome(Model(), method), outcome(Model(where, reentrant), method)
    if isinstance(result, str):
        assert reentrant or where == "all", result
        assert "checkpointing off" in result, result
        return
    # frozen encoders may be checkpointed in any way
    assert not reentrant or (where == "encoder" and method in ("read", "abpem"))
    assert result.keys() == right.keys()
    for name, grad in right.items():
        assert torch.allclose(result[name], grad, rtol=1e-9, atol=1e-12), name
    assert max(g.abs().max() for g in right.values()) > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["read", "abpem", "tent"])
def test_flags_are_switched_off_in_the_copy(method, reentrant):
    model = Flagged(True, reentrant)
    grads, right = gradients(model, method), gradients(Flagged(False), method)
    assert all(torch.allclose(grads[n], g, rtol=1e-9, atol=1e-12) for n, g in right.items())
    assert model.grad_checkpointing


def test_refusals_change_nothing():
    adapted = fasttta.adapt(Model("fusion", True).eval().double(), "read", spec=SPEC)
    before = {name: x.clone() for name, x in adapted.tuned.items()}
    for _ in range(2):
        with pytest.raises(ValueError, match="checkpointing off"):
            adapted.step(*batch())
    assert all(torch.equal(before[n], x) for n, x in adapted.tuned.items())


@pytest.mark.parametrize("name", ["joint", "three"])
def test_checkpointed_submodules(name):
    """The fusion layer's own forward wrapped, as activation-checkpoint wrappers do."""
    cls = {"joint": Joint, "three": Three}[name]

    class Wrapped(type(build(name).get_submodule(cls.spec.fusion[0].rpartition(".")[0] or "attn"))):
        def forward(self, *args, **kwargs):
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)

    def grads(wrap):
        model = build(name, dtype=torch.float64)
        if wrap:
            path = cls.spec.fusion[0].rpartition(".")[0] or "attn"
            model.get_submodule(path).__class__ = Wrapped
        adapted = fasttta.adapt(model, "abpem", k=2, spec=cls.spec)
        return adapted.step(*cls.batch(3, dtype=torch.float64), trace=True).grads

    right = grads(False)
    assert all(torch.allclose(g, right[n], rtol=1e-9) for n, g in grads(True).items())


class Around(Model):
    """One checkpoint around the encoder and the fusion, which does not compare what it computes
    again."""

    def __init__(self, where=None):
        super().__init__(where)
        self.f.norm_first = False  # its tensors are saved in another order than the encoder's

    def both(self, a, v):
        x = torch.cat((self.a(a), self.v(v)), 1)
        if self.where is None:
            return self.head(self.f(self.e(x)).mean(1))
        x = checkpoint(
            lambda y: self.f(self.e(y)), x, use_reentrant=False, determinism_check="none"
        )
        return self.head(x.mean(1))


@pytest.mark.parametrize("method", ["read", "abpem", "tent"])
def test_checkpoints_that_do_not_compare(method):
    """Where the encoder's kept result is given, the backward would compute other tensors."""
    right, result = outcome(Around(), method), outcome(Around("both"), method)
    assert not isinstance(right, str), right
    if isinstance(result, str):
        assert "checkpointing off" in result, result
        return
    for name, grad in right.items():
        assert torch.allclose(result[name], grad, rtol=1e-9, atol=1e-12), name
