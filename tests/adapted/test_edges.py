"""Few classes, one modality: a clear error or a sensible default, never a step without effect."""

from __future__ import annotations

import pytest
import torch
from cases import snapshot
from clips import tiny_clip, tiny_ids, tiny_views
from fusions import Joint, Three, build
from torch import nn

import fasttta
from fasttta.methods import ABPEM


def few(classes, tiny_model):
    """A model of fasttta's own, and one by a ModelSpec, with so many classes; and a batch each."""
    torch.manual_seed(0)
    cavmae, user = tiny_model(), build("joint")
    cavmae.num_classes = classes
    cavmae.mlp_head[1] = type(cavmae.mlp_head[1])(12, classes).requires_grad_(False)
    user.head = nn.Linear(16, classes)
    g = torch.Generator().manual_seed(1)
    batch = torch.randn(4, 6, 8, generator=g), torch.randn(4, 3, 6, 6, generator=g)
    return (cavmae, batch, {}), (user, Joint.batch(4), {"spec": Joint.spec})


def test_the_default_k_gives_way(tiny_model, tmp_path):
    for model, batch, options in few(6, tiny_model):
        default = fasttta.adapt(model, **options)
        six = fasttta.adapt(model, "abpem", k=6, **options)
        for _ in range(2):
            a, b = default.step(*batch), six.step(*batch)
            assert torch.equal(a.logits, b.logits)
            assert torch.equal(a.losses["entropy"], b.losses["entropy"])
        assert default.options.k == 6
        default.save(tmp_path)
        again = fasttta.load(model, tmp_path, **options)
        assert torch.equal(again.step(*batch).logits, default.step(*batch).logits)


def test_an_explicit_k_does_not(tiny_model):
    for model, batch, options in few(6, tiny_model):
        with pytest.raises(ValueError, match="k=8.*6 classes"):
            fasttta.adapt(model, "abpem", k=8, **options)(*batch)
        adapted = None
        if options:
            adapted = fasttta.adapt(model, ABPEM(k=7), **options)
            for _ in range(2):  # not only on the first batch
                with pytest.raises(ValueError, match="k=7.*6 classes"):
                    adapted(*batch)


def test_the_default_is_what_it_was():
    assert ABPEM().k == 8
    assert ABPEM() == ABPEM(k=8)
    assert "k=8" in repr(ABPEM())
    assert ABPEM.preset("vgg-video").k == 28


@pytest.mark.parametrize("method", ["read", "abpem", "tent", "eata", "sar"])
def test_a_single_logit(method, tiny_model):
    cases = few(1, tiny_model)
    for model, batch, options in cases[:1] if method == "sar" else cases:
        with pytest.raises(ValueError, match=r"logits \[B, 1\].*needed at least 2 classes"):
            fasttta.adapt(model, method, **options)(*batch)
        if options:
            adapted = fasttta.adapt(model, method, **options)
            before = snapshot(adapted)
            for _ in range(2):
                with pytest.raises(ValueError, match="at least 2 classes"):
                    adapted.step(*batch)
            after = snapshot(adapted)
            assert all(torch.equal(before[name], x) for name, x in after.items())
        source = fasttta.adapt(model, "source", **options)
        assert source.step(*batch).logits.shape == (4, 1)


def test_two_classes(tiny_model):
    for model, batch, options in few(2, tiny_model):
        adapted = fasttta.adapt(model, "abpem", lr=1e-2, **options)
        before = adapted.tuned
        assert adapted.step(*batch).losses["entropy"] > 0
        assert any(not torch.equal(before[name], x) for name, x in adapted.tuned.items())


def test_one_span():
    model = build("three")
    spec = fasttta.ModelSpec("attn", {"audio": (0, 4)}, "qkv", 1)
    with pytest.raises(ValueError, match="between modalities.*1 span.*at least 2 spans"):
        fasttta.adapt(model, "abpem", spec=spec, k=2)
    result = fasttta.adapt(model, "abpem", spec=spec, k=2, attention_weight=0.0).step(
        *Three.batch(3)
    )
    assert result.losses["total"] == result.losses["entropy"] - result.losses["balance"]
    for method in ("read", "tent", "source"):
        assert fasttta.adapt(model, method, spec=spec).step(*Three.batch(3)).logits.shape == (3, 4)


@pytest.mark.parametrize("method", ["tpt", "a-tpt", "r-tpt", "c-tpt", "rada"])
def test_one_class_of_a_clip(method):
    options = {} if method == "rada" else {"views": 6, "select": 0.5}
    options |= {"heads": 2} if method == "rada" else {}
    with pytest.raises(ValueError, match="at least 2"):
        fasttta.adapt(tiny_clip(), method, classes=tiny_ids()[:1], **options)(views=tiny_views())


def test_what_tunes_nothing_takes_one_class():
    for method in ("source", "mta", "ttc"):
        adapted = fasttta.adapt(tiny_clip(), method, classes=tiny_ids()[:1])
        assert adapted(views=tiny_views()).shape == (1, 1)
