"""Every constraint has an error that names the argument, and leaves the state alone."""

from __future__ import annotations

import pytest
import torch
from cases import METHODS, differing, snapshot

import fasttta
from fasttta import functional as F
from fasttta import methods


def _qk(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("function", [F.score_moments, F.attention_bootstrap])
def test_attention(function):
    q, k = _qk(2, 3, 7, 4)
    for args, error, match in (
        ((q[0], k[0], (4, 3)), ValueError, r"q must be \[batch, heads, tokens, head dim\]"),
        (([1], k, (4, 3)), TypeError, "q must be a tensor"),
        ((q, k[:, :, :6], (4, 3)), ValueError, "q and k must have one shape"),
        ((q, k.double(), (4, 3)), TypeError, "q and k must have one dtype"),
        ((q, k.to("meta"), (4, 3)), ValueError, "q and k must have one device"),
        ((q.int(), k.int(), (4, 3)), TypeError, "q must be floating point"),
        ((q, k, (4, 4)), ValueError, r"spans=\[4, 4\] must sum to the token count 7"),
        ((q, k, ()), ValueError, "must sum to the token count 7"),
        ((q, k, (6, 1)), ValueError, "at least 2 tokens"),
        ((q, k, (8, -1)), ValueError, "at least 2 tokens"),
        ((q, k, (4, 3), None, "all"), ValueError, "heads='all' is unknown; known: 'mean', 'each'"),
    ):
        with pytest.raises(error, match=match):
            function(*args)
    with pytest.raises(TypeError, match="spans must be integers"):
        function(q, k, (4.9, 3.1))
    with pytest.raises(ValueError, match="scale=nan must be finite"):
        function(q, k, (4, 3), float("nan"))
    with pytest.raises(ValueError, match="pair='value' is unknown"):
        F.attention_bootstrap(q, k, (4, 3), pair="value")
    with pytest.raises(ValueError, match=r"anchor.mean must be \[2\], found \[3\]"):
        F.attention_bootstrap(q, k, (4, 3), anchor=F.Moments(torch.ones(3), torch.ones(3)))
    with pytest.raises(ValueError, match="backend='cpp': .* has no cpp kernel"):
        function(q, k, (4, 3), backend="cpp")
    with pytest.raises(ValueError, match="backend='cuda' is unknown; known: None"):
        function(q, k, (4, 3), backend="cuda")


def test_logits():
    z = torch.randn(3, 5)
    for call, error, match in (
        (lambda: F.entropy(z[0]), ValueError, r"logits must be \[samples, classes\]"),
        (lambda: F.entropy(z.long()), TypeError, "logits must be floating point"),
        (lambda: F.entropy(z[:, :0]), ValueError, "at least 0 sample and 1 class"),
        (lambda: F.principal_entropy(z, 0), ValueError, "k=0 is out of range, needed 1 to 5"),
        (lambda: F.principal_entropy(z, 6), ValueError, "k=6 is out of range"),
        (lambda: F.principal_entropy(z, 2.0), TypeError, "k must be an int"),
        (lambda: F.principal_entropy(z, True), TypeError, "k must be an int"),
        (lambda: F.principal_entropy(z, 2, -1.0), ValueError, "eps=-1.0"),
        (lambda: F.balance_entropy(z[:0]), ValueError, "at least 1 sample"),
        (lambda: F.balance_entropy(z, "sum"), ValueError, "form='sum' is unknown"),
        (lambda: F.balance_entropy(z, weight=torch.ones(2)), ValueError, r"weight must be \[3\]"),
        (lambda: F.balance_entropy(z, weight=[1, 1, 1]), TypeError, "weight must be a tensor"),
        (lambda: F.balance_entropy(z, weight=torch.ones(3, device="meta")), ValueError, "device"),
        (lambda: F.adaptation_head(z[:0], 2), ValueError, "at least 1 sample"),
        (lambda: F.adaptation_head(z, 9), ValueError, "k=9 is out of range"),
        (lambda: F.adaptation_head(z, 2, balance="x"), ValueError, "balance='x' is unknown"),
        (lambda: F.adaptation_head(z, 2, backend="c"), ValueError, "backend='c' is unknown"),
        (lambda: F.gaussian_kl(1.0, z, z, z), TypeError, "mean_p must be a floating point tensor"),
        (lambda: F.gaussian_kl(z, z, z, z, backend="cpp"), ValueError, "has no cpp kernel"),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("method", methods.names("fusion"))
def test_a_bad_batch_changes_nothing(tiny_model, tiny_batch, method):
    adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
    audio, video = tiny_batch()
    adapted(audio, video)
    before = snapshot(adapted)
    poisoned, infinite = audio.clone(), video.clone()
    poisoned[1, 2, 3], infinite[4, 0, 0, 0] = torch.nan, -torch.inf
    for inputs, error, match in (
        ((audio,), TypeError, r"needed 2 inputs \(audio, video\), found 1"),
        ((audio, video, video), TypeError, "found 3"),
        ((audio[0], video), ValueError, "audio must have 3 dimensions"),
        ((audio, video[:3]), ValueError, "audio has 5 samples, video 3"),
        ((audio[:0], video[:0]), ValueError, "audio is an empty batch"),
        ((audio.to("meta"), video), ValueError, "audio is on meta, the model on cpu"),
        ((audio, (video * 255).byte()), TypeError, "video must be floating point"),
        ((poisoned, video), ValueError, "audio holds non-finite values"),
        ((audio, infinite), ValueError, "video holds non-finite values"),
        ((audio, None), TypeError, "video must be a tensor"),
    ):
        for call in (adapted, adapted.step, adapted.predict):
            with pytest.raises(error, match=match):
                call(*inputs)
        with pytest.raises(error, match=match):
            list(adapted.stream([inputs]))
        assert differing(before, adapted) == []


def test_adapt(tiny_model):
    model = tiny_model()
    for options, error, match in (
        ({"method": "tint"}, ValueError, "method='tint' is unknown; known: 'source', 'tent'"),
        ({"method": 3}, TypeError, "method must be a name or a method object"),
        ({"method": fasttta.methods.Tent}, TypeError, r"give an object of it: Tent\(...\)"),
        ({"method": "read", "k": 3}, TypeError, "READ has no option k; known: steps, score_at, lr"),
        (
            {"method": methods.READ(), "lr": 1.0},
            TypeError,
            "options are given to the method object",
        ),
        ({"k": 8}, ValueError, "k=8: needed at most the model's 7 classes"),
        ({"precision": "fp16"}, ValueError, "precision='fp16' is unknown; known: 'auto'"),
        ({"engine": "fast"}, ValueError, "engine='fast' is unknown; known: 'auto'"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"seed": -1}, ValueError, "seed=-1 is out of range"),
        ({"seed": 2**70}, ValueError, "out of range"),
        ({"classes": ["a"]}, ValueError, "take no classes"),
        ({"guard": True}, TypeError, "guard must be a fasttta.ShiftDetector, found True"),
        ({"spec": "cavmae"}, TypeError, "must be a fasttta.ModelSpec, found str"),
        ({"source_stats": 1, "k": 3}, ValueError, 'used only with anchor="source"'),
        ({"method": "read", "source_stats": 1}, TypeError, "READ has no option source_stats"),
        ({"method": "tent", "fisher": {}}, TypeError, "Tent has no option fisher"),
        (
            {"method": "eata", "fisher": {}},
            ValueError,
            "fisher is of another model.*collect_fisher",
        ),
        ({"anchor": "source", "k": 3}, ValueError, "needs source_stats, found None.*collect_stats"),
    ):
        with pytest.raises(error, match=match):
            fasttta.adapt(model, **options)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='engine="graph" needs a model on a GPU'):
            fasttta.adapt(model, k=3, engine="graph")
        with pytest.raises(ValueError, match='precision="tf32" needs CUDA'):
            fasttta.adapt(model, k=3, precision="tf32")


def test_unknown_models(tiny_model):
    with pytest.raises(TypeError, match="must be a torch.nn.Module, found dict"):
        fasttta.adapt({})
    with pytest.raises(TypeError, match="Linear is not a model.*looked for.*found children none"):
        fasttta.adapt(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 0}, "k=0: needed an integer of at least 1"),
        ({"k": 2.0}, "k=2.0"),
        ({"window": 0}, "window=0"),
        ({"steps": 0}, "steps=0"),
        ({"lr": 0.0}, "lr=0.0: needed a finite number above 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": "1e-4"}, "lr='1e-4'"),
        ({"score_at": "now"}, "score_at='now': needed"),
        ({"entropy_weight": float("inf")}, "entropy_weight=inf"),
        ({"balance": "sum"}, "balance='sum'"),
        ({"heads": 4}, "heads=4"),
        ({"pair": "both"}, "pair='both'"),
        ({"anchor": "none"}, "anchor='none'"),
    ],
)
def test_method_options(options, match):
    with pytest.raises(ValueError, match=match):
        methods.ABPEM(**options)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("eata", {"e_margin": 0.0}, "e_margin=0.0: needed a finite number above 0"),
        ("eata", {"d_margin": -1.0}, "d_margin=-1.0"),
        ("eata", {"fisher_weight": -1.0}, "fisher_weight=-1.0: needed a finite number of at least"),
        ("sar", {"rho": 0.0}, "rho=0.0"),
        ("sar", {"e_margin": "2"}, "e_margin='2'"),
        ("sar", {"reset_below": None}, "reset_below=None"),
    ],
)
def test_layernorm_method_options(method, options, match):
    with pytest.raises(ValueError, match=match):
        methods.by_name(method)(**options)


def test_presets():
    with pytest.raises(ValueError, match="ABPEM has no preset 'ks50'; known: 'ks50-video'"):
        methods.ABPEM.preset("ks50")
    with pytest.raises(ValueError, match="Source has no preset 'x'; known: none"):
        methods.Source.preset("x")
