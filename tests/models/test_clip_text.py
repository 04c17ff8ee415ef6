"""The text tower on a class list equals the tower on every prompt by itself, in full length."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from clips import EOT, SOT, tiny_clip, tiny_ids

from fasttta.models.clip import text as clip_text

EXACT = 1e-12


def naive(model, ids, prompt=None):
    """Every prompt to the whole context, prefix and padding included: [C, E]."""
    ids = F.pad(ids, (0, model.context_length - ids.shape[1]))
    x = model.token_embedding(ids)
    if prompt is not None:
        n = len(prompt)
        x = torch.cat((x[:, :1], prompt.expand(len(ids), -1, -1), x[:, 1 + n :]), 1)
    x = x + model.positional_embedding
    for block in model.transformer.resblocks:
        n = block.ln_1(x)
        q, k, v = map(block.attn.split, block.attn.project(n))
        scores = q @ k.transpose(-1, -2) * block.attn.scale
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = scores.masked_fill(mask, -torch.inf).softmax(-1)
        x = x + block.attn.combine(p @ v)
        x = x + block.mlp(block.ln_2(x))
    x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)]
    return x @ model.text_projection


def rows(*names: list[int], prompt=(5, 6, 7), rest=()):
    """Token ids of class names given as tokens, padded with 0."""
    texts = [torch.tensor([SOT, *prompt, *rest, *name, EOT]) for name in names]
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)


CASES = {
    "ragged": (tiny_ids(), 4),
    "many": (tiny_ids(40, prompt=2), 2),
    "equal lengths": (rows([20, 21], [22, 23], [24, 25]), 3),
    "one class": (rows([20, 21, 22]), 3),
    "a class without a name": (rows([], [30, 31, 32]), 3),
    "frozen tail of the prompt": (rows([20], [30, 31], rest=(8, 9)), 3),
    "names that begin alike": (rows([20, 21, 30], [20, 21, 31, 32], [20, 21]), 2),
    "the whole context": (rows([40] * 11, [41]), 3),
    "the same class twice": (rows([20], [20], [30, 31]), 1),
}


@pytest.fixture(params=["kept", "recomputed", "in pieces", "repeated", "repeated, recomputed"])
def way(request, monkeypatch):
    """How activations are held; pieces of at most 7 tokens; the shared tokens once for each class,
    as on a GPU."""
    if "repeated" in request.param:
        monkeypatch.setattr(clip_text, "_REPEATED", {"cpu": 512, "cuda": 512})
    if request.param not in ("kept", "repeated"):
        monkeypatch.setattr(clip_text, "_KEEP_BYTES", 0)
    if request.param == "in pieces":
        monkeypatch.setattr(clip_text, "_TOKENS", {"cpu": 7, "cuda": 7})
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_features_and_gradient(case, way):
    ids, length = CASES[case]
    model = tiny_clip().double()
    prompts = model.prompts(ids, length)
    assert (prompts.repeated is None) == ("repeated" not in way)
    assert torch.equal(prompts.initial, model.token_embedding.weight[ids[0, 1 : 1 + length]])
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(3, length, 20, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(3, len(ids), 12, generator=generator, dtype=torch.float64)
    for start in (None, prompts.initial + noise):
        at = prompts.linearise(start)
        assert at.features.shape == (1 if start is None else 3, len(ids), 12)
        gradients = at.pullback(cotangent)
        for i in range(3):
            leaf = (prompts.initial if start is None else start[i]).clone().requires_grad_()
            expected = naive(model, ids, leaf)
            (grad,) = torch.autograd.grad(expected, leaf, cotangent[i])
            features = at.features[0 if start is None else i]
            assert (features - expected).abs().max() <= EXACT * expected.abs().max()
            assert (gradients[i] - grad).abs().max() <= EXACT * max(1, grad.abs().max())
    # a second call gives the same bits
    assert torch.equal(
        prompts.linearise().pullback(cotangent), prompts.linearise().pullback(cotangent)
    )
    assert torch.equal(prompts.features(), prompts.linearise().features)


def test_encode_text_and_what_follows_the_end():
    model, ids = tiny_clip().double(), tiny_ids()
    expected = naive(model, ids)
    assert (model.encode_text(ids) - expected).abs().max() <= EXACT * expected.abs().max()
    noisy = ids.clone()
    for row in noisy:
        row[row.argmax() + 1 :] = 77
    assert torch.equal(model.encode_text(noisy), model.encode_text(ids))
    assert torch.equal(model.encode_text(F.pad(ids, (0, 2))), model.encode_text(ids))
    lone = torch.cat([model.encode_text(row[None]) for row in ids])
    assert (lone - expected).abs().max() <= EXACT * expected.abs().max()


def test_nothing_is_computed_twice():
    """Tokens in the packed chunks: every class's own, the shared ones once."""
    ids = CASES["frozen tail of the prompt"][0]
    prompts = tiny_clip().prompts(ids, 3)
    assert prompts.prefix == 6
    assert sum(len(chunk.tokens) for chunk in prompts.chunks) == 2 + 3


def test_starting_elsewhere():
    model, ids = tiny_clip().double(), tiny_ids()
    prompts = model.prompts(ids, 4)
    before = prompts.linearise().features
    prompts.start_at(prompts.initial + 1)
    expected = naive(model, ids, prompts.initial)
    assert (prompts.linearise().features[0] - expected).abs().max() <= EXACT * 10
    assert not torch.equal(prompts.linearise().features, before)


def test_bad_ids():
    model, ids = tiny_clip(), tiny_ids()
    different = ids.clone()
    different[2, 3] = 50
    long = torch.full((2, 20), 50)
    long[:, 0], long[0, 4], long[1, 17] = SOT, EOT, EOT
    for call, error, match in (
        (lambda: model.prompts(ids.int()), TypeError, r"int64 tensor \[C, L\], found torch.int32"),
        (lambda: model.prompts([[1, 2]]), TypeError, "found list"),
        (lambda: model.prompts(ids[0]), ValueError, r"must be \[C, L\], found \[14\]"),
        (lambda: model.prompts(ids[:0]), ValueError, r"must be \[C, L\]"),
        (lambda: model.prompts(ids + 10), ValueError, "the vocabulary has 100"),
        (lambda: model.prompts(ids, 13), ValueError, "needed more than SOT and the 13 tokens"),
        (lambda: model.prompts(different, 4), ValueError, "prompt_length=4: the classes differ"),
        (lambda: model.encode_text(long), ValueError, "class 1 has 18 tokens, the context 16"),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize(("gib", "kept"), [(141, 141 * 64), (24, 24 * 64), (2, 256)])
def test_what_is_kept_is_a_share_of_a_gpus_memory(monkeypatch, gib, kept):
    """On an H200 enough for 1000 classes of 18 tokens, which need 6.2 GiB."""
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert clip_text._kept_bytes(torch.device("cuda")) == kept * 2**20
    assert clip_text._kept_bytes(torch.device("cpu")) == 256 * 2**20
