"""CLIPs of TPT's line of code, whose causal mask is cut, and their wrapper of prompts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from clips import EOT, tiny_ids, tiny_views
from lookalikes import ClipTestTimeTuning, CutCLIP

import fasttta
from fasttta.families import recognise
from fasttta.models.clip.model import MEAN, STD

METHODS = {
    "a-tpt": {"views": 6, "select": 0.5}, "tpt": {"views": 6, "select": 0.5},
    "c-tpt": {"views": 6, "select": 0.5}, "r-tpt": {"views": 6, "select": 0.5},
    "mta": {"views": 6}, "ttc": {}, "source": {}, "rada": {"heads": 3},
}  # fmt: skip


def _normalised(pixels):
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (pixels - mean) / std


def _ids():
    return tiny_ids(length=13)  # as long as the mask


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(name):
    module, views = CutCLIP(), tiny_views()
    with pytest.raises(RuntimeError):  # whatever ids it is given
        module.encode_text(nnf.pad(_ids(), (0, 3)))
    wrapper = ClipTestTimeTuning(module, _ids(), 4)
    expected = wrapper(_normalised(views.base[:1])).detach()
    whole = fasttta.models.CLIP.from_tensors(
        {n: x.detach() for n, x in module.state_dict().items()}, _sizes(module)
    )
    results = []
    for model in (module, whole):
        adapted = fasttta.adapt(model, name, classes=_ids(), **METHODS[name])
        stream = name in ("rada", "source")
        given = {"images": views.base[:1]} if stream else {"views": views}
        assert torch.allclose(adapted.predict(**given), expected, atol=1e-4)
        results.append(adapted.step(**given).logits)
    assert torch.allclose(*results, atol=1e-4)


def _sizes(module):
    from fasttta.models.clip.checkpoint import infer_clip_sizes

    sizes = infer_clip_sizes(module.state_dict())
    sizes["text"]["heads"], sizes["vision"]["heads"] = 2, 3
    return sizes


def test_the_context_is_that_of_the_mask():
    module = CutCLIP()
    assert recognise(module).model.context_length == 13
    assert module.positional_embedding.shape[0] == 16
    long = torch.cat((_ids(), torch.zeros(6, 2, dtype=torch.int64)), 1)
    padded = fasttta.adapt(module, "tpt", classes=long, views=6, select=0.5)
    plain = fasttta.adapt(module, "tpt", classes=_ids(), views=6, select=0.5)
    views = tiny_views()
    assert torch.equal(padded.step(views=views).logits, plain.step(views=views).logits)
    long[2] = long[2].masked_fill(long[2] == EOT, 20)
    long[2, 13:] = torch.tensor([20, EOT])
    with pytest.raises(ValueError, match="class 2 has 15 tokens, the context 13"):
        fasttta.adapt(module, "tpt", classes=long)


def test_the_wrapper_says_what_to_pass():
    """And what it says gives the wrapper's numbers, its learned prompt included."""
    module, views = CutCLIP(), tiny_views()
    wrapper = ClipTestTimeTuning(module, _ids(), 4)
    wrapper.prompt_learner.ctx.data.normal_(generator=torch.Generator().manual_seed(1))
    with pytest.raises(
        TypeError, match="ClipTestTimeTuning is a wrapper .* prompt_length="
    ) as told:
        fasttta.adapt(wrapper, "r-tpt", classes=_ids())
    for part in ("tokenized_prompts", "n_ctx", "load_tuned"):
        assert part in str(told.value)
    learner = wrapper.prompt_learner
    adapted = fasttta.adapt(
        module, "r-tpt", classes=learner.tokenized_prompts, prompt_length=learner.n_ctx, views=6,
        select=0.5,
    )  # fmt: skip
    adapted.load_tuned({"prompt": learner.ctx})
    expected = wrapper(_normalised(views.base[:1])).detach()
    assert torch.allclose(adapted.predict(views=views), expected, atol=1e-4)
    assert torch.allclose(adapted.step(views=views).logits_before, expected, atol=1e-4)
