"""Source statistics and the anchor they give ABPEM."""

from __future__ import annotations

import pytest
import torch

import fasttta
from fasttta import functional as F


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_collect_and_anchor(tiny_model, tiny_batch, tmp_path, heads):
    model = tiny_model()
    clean = [tiny_batch(4, seed=s) for s in range(5)]
    stats = fasttta.collect_stats(model, clean, n=10)
    assert stats.n == 10
    used = [torch.cat([b[i] for b in clean])[:10] for i in range(2)]
    _, (q, k, scale) = model.fuse_attention(model.encode(*used))
    moments = F.score_moments(q, k, model.spans, scale, heads, backend="reference")
    own = [x.diagonal(dim1=-2, dim2=-1) for x in moments]
    std, mean = stats.self_scores(heads)
    assert torch.allclose(mean, own[0].mean(0), atol=1e-6)
    assert torch.allclose(std, own[1].square().mean(0).sqrt(), atol=1e-6)

    stats.save(tmp_path / "stats.safetensors")
    again = fasttta.SourceStats.load(tmp_path / "stats.safetensors")
    assert again.n == 10
    assert torch.equal(again.self_scores(heads)[0], std)

    options = {"k": 3, "window": 1, "anchor": "source", "heads": heads, "lr": 1e-3}
    adapted = fasttta.adapt(model, "abpem", **options, source_stats=stats)
    batch = tiny_batch(seed=8)
    result = adapted.step(*batch)
    _, (q, k, scale) = model.fuse_attention(model.encode(*batch))
    expected = F.attention_bootstrap(
        q, k, model.spans, scale, heads, anchor=F.Moments(mean, std), backend="reference"
    )
    assert torch.allclose(result.stats["attention_gap"], expected, atol=1e-5)
    own_anchor = fasttta.adapt(model, "abpem", **{**options, "anchor": "self"}).step(*batch)
    assert not torch.allclose(own_anchor.losses["attention"], result.losses["attention"])

    adapted.save(tmp_path)
    loaded = fasttta.load(model, tmp_path)  # the statistics travel with the state
    assert torch.equal(loaded.step(*batch).logits, adapted.step(*batch).logits)


def test_bad_statistics(tiny_model, tiny_batch, tmp_path):
    model = tiny_model()
    for n in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="needed a positive integer"):
            fasttta.collect_stats(model, [tiny_batch()], n=n)
    with pytest.raises(ValueError, match="yielded no batch"):
        fasttta.collect_stats(model, [])
    with pytest.raises(ValueError, match="audio must have 3 dimensions"):
        fasttta.collect_stats(model, [(torch.zeros(3), torch.zeros(3))])
    with pytest.raises(TypeError, match=r"needed 2 inputs \(audio, video\), found 3; labels"):
        fasttta.collect_stats(model, [(*tiny_batch(), torch.zeros(5))])
    one, two = torch.ones(2), torch.ones(3, 2)
    for changes, match in (
        ({"scores": (one, two)}, "scores must be"),
        ({"scores_per_head": (one, one)}, "scores_per_head must be"),
        ({"scores": (one * 0, one)}, "std above 0"),
        ({"scores": (one, one * torch.nan)}, "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            fasttta.SourceStats(
                **{"scores": (one, one), "scores_per_head": (two, two), "n": 1, **changes}
            )
    with pytest.raises(TypeError, match="must be a pair of tensors"):
        fasttta.SourceStats(scores=(0.1, 0.2))
    with pytest.raises(FileNotFoundError, match="no source statistics"):
        fasttta.SourceStats.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"nothing of use")
    with pytest.raises(ValueError, match="holds no source statistics"):
        fasttta.SourceStats.load(tmp_path / "bad")
    three = fasttta.SourceStats(
        scores=(torch.ones(3), torch.ones(3)), scores_per_head=(torch.ones(2, 3),) * 2, n=1
    )
    for heads, match in (("mean", r"\[3\], needed \[2\]"), ("each", r"\[2, 3\], needed \[3, 2\]")):
        with pytest.raises(ValueError, match=match):
            fasttta.adapt(model, k=3, anchor="source", heads=heads, source_stats=three)
    with pytest.raises(ValueError, match="have no scores_per_head; collect them"):
        fasttta.adapt(
            model, k=3, anchor="source", heads="each",
            source_stats=fasttta.SourceStats(scores=(one, one)),
        )  # fmt: skip
    with pytest.raises(TypeError, match="must be fasttta.SourceStats, found int"):
        fasttta.adapt(model, k=3, anchor="source", source_stats=1)
