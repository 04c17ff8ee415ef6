"""The last prediction is the first pass of the next step: the same numbers, one pass fewer."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import METHODS, same, state_equal

import fasttta
from fasttta.models import CAVMAE


@pytest.fixture
def passes(monkeypatch):
    """Sizes of the batches that the fusion runs on."""
    sizes, plain = [], CAVMAE.fuse_attention

    def counted(self, tokens):
        sizes.append(len(tokens))
        return plain(self, tokens)

    monkeypatch.setattr(CAVMAE, "fuse_attention", counted)
    return sizes


def make(model, **options):
    return fasttta.adapt(model, "abpem", **{**METHODS["abpem"], **options})


def test_one_pass_fewer_and_the_same_bits(tiny_model, tiny_batch, passes):
    ahead, plain = make(tiny_model()), make(tiny_model())
    plain._step.keeps_passes, plain._step.kept_passes = False, None
    for seed in range(5):
        batch = tiny_batch(seed=seed)
        passes.clear()
        a = ahead.step(*batch)
        window = min(seed + 1, 3)
        # the batches before the last one, the current one, and the prediction
        assert len(passes) == (2 if seed == 0 else window)
        assert same(a, plain.step(*batch))
        assert state_equal(ahead, plain)


@pytest.mark.parametrize("options", [{"window": 1}, {"score_at": "before"}])
def test_nothing_is_kept_where_it_is_of_no_use(tiny_model, options):
    assert not make(tiny_model(), **options)._step.keeps_passes


def test_changed_weights_are_noticed(tiny_model, tiny_batch, tmp_path, passes):
    """After whatever changes the state, the step computes all passes and is that of a fresh one."""
    model = tiny_model()
    batches = [tiny_batch(seed=s) for s in range(4)]

    def ran(adapted):
        for batch in batches[:2]:
            adapted.step(*batch)
        return adapted

    other = {name: x + 0.1 for name, x in make(model).tuned.items()}
    for change in (
        lambda adapted: adapted.load_tuned(other),
        lambda adapted: adapted.load_tuned(adapted.tuned),
        lambda adapted: adapted._state.journal()(),
    ):
        adapted, plain = ran(make(model)), ran(make(model))
        change(adapted)
        change(plain)
        plain._step.keeps_passes, plain._step.kept_passes = False, None
        passes.clear()
        a = adapted.step(*batches[2])
        assert len(passes) == 4
        assert same(a, plain.step(*batches[2]))
    adapted = ran(make(model))
    adapted.save(tmp_path)
    twin, loaded = copy.deepcopy(adapted), fasttta.load(model, tmp_path)
    expected = adapted.step(*batches[2])
    assert same(twin.step(*batches[2]), expected)
    assert same(loaded.step(*batches[2]), expected)
    adapted.reset()
    assert same(adapted.step(*batches[3]), make(model).step(*batches[3]))


def test_source_block_and_prediction_in_between(tiny_model, tiny_batch):
    adapted, plain = make(tiny_model()), make(tiny_model())
    for seed in range(3):
        batch = tiny_batch(seed=seed)
        with adapted.source():
            adapted(*batch)
        adapted.predict(*tiny_batch(seed=9))
        assert same(adapted.step(*batch), plain.step(*batch))


def test_a_step_that_fails_keeps_nothing(tiny_model, tiny_batch):
    adapted, plain = make(tiny_model()), make(tiny_model())
    adapted.step(*tiny_batch(seed=0))
    plain.step(*tiny_batch(seed=0))
    adapted._step.kept_passes._model.mlp_head.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        adapted.step(*tiny_batch(seed=1))
    adapted._step.kept_passes._model.mlp_head._forward_pre_hooks.clear()
    for seed in (1, 2):
        assert same(adapted.step(*tiny_batch(seed=seed)), plain.step(*tiny_batch(seed=seed)))


def _fail(*_):
    raise RuntimeError("on purpose")


def test_leaves_are_free_of_graphs(tiny_model, tiny_batch):
    adapted = make(tiny_model())
    adapted.step(*tiny_batch())
    assert not any(x.requires_grad for x in adapted.tuned.values())
    result = adapted.step(*tiny_batch(seed=1))
    assert not result.logits.requires_grad
    assert all(x.grad is None for x in adapted._state.leaves.values())
    assert torch.isfinite(result.logits).all()
