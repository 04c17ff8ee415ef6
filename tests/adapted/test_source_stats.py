"""Source statistics and the anchor they give ABPEM."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from places import SHARED
from safetensors.torch import load_file

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
    blocks = [x.diagonal(dim1=-2, dim2=-1) for x in moments]
    std, mean = stats.self_scores(heads)
    assert torch.allclose(mean, blocks[0].mean(0), atol=1e-6)
    assert torch.allclose(std, blocks[1].square().mean(0).sqrt(), atol=1e-6)

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


def test_fewer_samples_than_wanted(tiny_model, tiny_batch):
    assert fasttta.collect_stats(tiny_model(), [tiny_batch(5), tiny_batch(3)], n=32).n == 8
    assert fasttta.collect_stats(tiny_model(), [tiny_batch(5), tiny_batch(3)], n=6).n == 6


def test_features(tiny_model, tiny_batch, tmp_path):
    """Of pooled features behind every block, over samples that come in odd batches."""
    model = tiny_model(depth=(1, 2, 1))
    clean = [tiny_batch(n, seed=n) for n in (4, 1, 5, 7)]
    stats = fasttta.collect_stats(model, clean, n=12)
    audio, video = (torch.cat([b[i] for b in clean])[:12] for i in range(2))
    x, y = model.embed_audio(audio), model.embed_video(video)
    x, _ = model.blocks_a[0](x)
    first, _ = model.blocks_v[0](y)
    second, _ = model.blocks_v[1](first)
    fused = model.blocks_u[0].norm1
    expected = {
        "audio": [fused(x)],
        "video": [model.blocks_v[1].norm1(first), fused(second)],
        "joint": [model.norm(model.blocks_u[0](torch.cat((x, second), 1))[0])],
    }
    for name, tokens in expected.items():
        pooled = torch.stack([t.mean(1) for t in tokens], 1)
        std, mean = getattr(stats, name)
        assert std.shape == mean.shape == pooled.shape[1:]
        assert torch.allclose(std, pooled.std(0), atol=1e-5)
        assert torch.allclose(mean, pooled.mean(0), atol=1e-5)
    stats.save(tmp_path / "stats.safetensors")
    again = fasttta.SourceStats.load(tmp_path / "stats.safetensors")
    assert again.model == stats.model
    for name in (*expected, "scores"):
        pairs = zip(getattr(again, name), getattr(stats, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    one = fasttta.collect_stats(model, clean, n=1)
    assert one.audio is None  # one sample has no spread
    assert one.scores is not None


OFFICIAL = SHARED / "data" / "brimpr_source_statistics"


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official statistics files are not here")
def test_official_file():
    """Saved from a GPU; read on any machine."""
    stats = fasttta.SourceStats.from_official(OFFICIAL / "official_ks50.pth")
    expected = load_file(OFFICIAL / "ks50.safetensors")
    for name, shape in (("audio", (11, 768)), ("video", (11, 768)), ("joint", (1, 768))):
        for x, part in zip(getattr(stats, name), ("std", "mean"), strict=True):
            assert x.device.type == "cpu"
            assert x.shape == shape
            assert torch.equal(x, expected[f"{name}.{part}"])
    plain = fasttta.SourceStats.load(OFFICIAL / "vggsound.safetensors")  # without our metadata
    assert plain.joint[1].norm().item() == pytest.approx(20.7, abs=0.1)
    assert plain.n is None


class Evil:
    def __reduce__(self):
        return Path("/tmp").joinpath, ("pwned",)


def test_official_file_is_not_run(tmp_path):
    path = tmp_path / "src_stat.pth"
    pair = torch.ones(2, 3), torch.zeros(2, 3)
    for legacy in (False, True):
        torch.save((pair, pair, pair), path, _use_new_zipfile_serialization=not legacy)
        stats = fasttta.SourceStats.from_official(path)
        assert all(torch.equal(a, b) for a, b in zip(stats.video, pair, strict=True))
    for content, match in (
        (pair, "needed three pairs"),
        ({"audio": pair}, "needed three pairs .*found dict"),
        ((pair, pair, (pair[0],)), "needed three pairs"),
        ((pair, pair, (1.0, 2.0)), "must be a pair of tensors"),
        ((pair, pair, (pair[0] * torch.nan, pair[1])), "joint must be finite"),
        ((pair, pair, Evil()), "was not run"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=match):
            fasttta.SourceStats.from_official(path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="was not run"):
        fasttta.SourceStats.from_official(path)
    with pytest.raises(FileNotFoundError, match="no source statistics"):
        fasttta.SourceStats.from_official(tmp_path / "none")


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
        ({"audio": (one, one)}, r"audio must be .*\[blocks, D\]"),
        ({"video": (two, two[:1])}, "video must be"),
        ({"joint": (-two, two)}, "joint must be finite with std at least 0"),
        ({"joint": (two, two * torch.inf)}, "joint must be finite"),
    ):
        with pytest.raises(ValueError, match=match):
            fasttta.SourceStats(
                **{"scores": (one, one), "scores_per_head": (two, two), "n": 1, **changes}
            )
    for pair in ((0.1, 0.2), one, (one,), (one.int(), one.int())):
        with pytest.raises(TypeError, match="must be a pair of tensors"):
            fasttta.SourceStats(scores=pair)
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
