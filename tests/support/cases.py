"""Methods with options for the tiny model, and what equal means."""

from __future__ import annotations

import torch


def tiny_stats():
    """Source statistics that fit the tiny model: 1 and 2 encoder blocks of width 12."""
    from fasttta import SourceStats

    generator = torch.Generator().manual_seed(0)

    def pair(n):
        mean = torch.randn(n, 12, generator=generator)
        return torch.rand(n, 12, generator=generator) + 0.1, mean

    return SourceStats(audio=pair(1), video=pair(2), joint=pair(1))


def tiny_model(seed: int = 0, **sizes):
    """A CAV-MAE of odd sizes: 6 + 4 tokens of width 12, 7 classes."""
    from fasttta.models import CAVMAE

    torch.manual_seed(seed)
    sizes = {
        "dim": 12, "num_heads": 3, "audio_tokens": 6, "video_tokens": 4, "depth": (1, 2, 1),
        "patch_audio": (4, 2), "patch_video": (3, 3), **sizes,
    }  # fmt: skip
    model = CAVMAE(7, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


METHODS = {
    "source": {},
    "tent": {"lr": 1e-3},
    # margins that some of the tiny model's samples are above and some below
    "eata": {"lr": 1e-3, "e_margin": 1.9, "d_margin": 0.999},
    "sar": {"lr": 1e-3, "e_margin": 1.9, "rho": 0.01},
    "read": {"lr": 1e-3},
    "abpem": {"k": 3, "window": 3, "lr": 1e-3},
    "brimpr": {"lr": 1e-3, "prompts": (2, 3), "source_stats": tiny_stats()},
    "rada": {"lr": 1e-3, "heads": 3},
}


def flat(result):
    """The tensors of a StepResult, in a fixed order."""
    yield result.logits
    yield result.logits_before
    yield result.n_used
    for group in (result.losses, result.stats):
        for name in sorted(group):
            yield group[name]


def same(a, b):
    """Two results bit for bit, nan equal to nan."""
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    return all(torch.allclose(x, y, **exact) for x, y in zip(flat(a), flat(b), strict=True))


def snapshot(adapted) -> dict[str, torch.Tensor]:
    """A deep copy of everything that a later session of an adapted model needs, by name.

    The only way in which tests take a state: what the model itself hands out may be live memory,
    which is always equal to itself. Holds tuned tensors, optimiser, method and random state, the
    values that a guard looks back at, class tokens, and the prompt of image models. Takes all
    kinds of adapted models, and a snapshot (of which it makes a copy).
    """
    if isinstance(adapted, dict):
        tensors = adapted
    elif hasattr(adapted, "_state"):
        tensors = {**adapted._state.tensors()}
    else:  # images that are episodes: only the prompt that they start from is kept
        tensors = {f"tuned.{name}": x for name, x in adapted.tuned.items()}
        tensors["prompt"] = adapted._start
        tensors["source"] = adapted._source_prompt
    if getattr(adapted, "_ids", None) is not None:
        tensors["classes"] = adapted._ids
    if getattr(adapted, "_guard", None) is not None:
        for name, values in adapted._guard_record()["values"].items():
            tensors[f"guard.{name}"] = torch.tensor(values, dtype=torch.float64)
    return {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}


def state_equal(a, b) -> bool:
    """Whether two adapted models, or snapshots of them, hold the same state bit for bit."""
    return differing(a, b) == []


def differing(a, b) -> list[str]:
    """Names of what differs in two states, each an adapted model or a snapshot."""
    x, y = snapshot(a), snapshot(b)
    assert x, "the state is empty: nothing would be compared"
    return sorted(n for n in x.keys() | y.keys() if not (n in x and n in y and _bits(x[n], y[n])))


def _bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))


def buffered(adapted):
    """The adapted model with its steps on static buffers, as a CUDA graph replays them; run
    without capture, so that no GPU is needed."""
    from fasttta.engine.episode_graph import GraphEpisodes
    from fasttta.engine.graph import GraphStep

    if hasattr(adapted, "_episodic"):
        parts = adapted._episodic, adapted._clip, adapted._prompts
        adapted._captured = GraphEpisodes(*parts, capture=False)
        return adapted
    step = adapted._step
    options = step.model, step.method, step.state, step.precision, step.device
    adapted._step = GraphStep(*options, False, capture=False)
    return adapted


def close(a, b):
    """Asserts that two results in float64 are the same but for the order of sums."""
    assert int(a.n_used) == int(b.n_used)
    assert a.losses.keys() == b.losses.keys()
    assert a.stats.keys() == b.stats.keys()
    pairs = [(a.logits, b.logits), (a.logits_before, b.logits_before)]
    for x, y in (*pairs, *((a.losses[n], b.losses[n]) for n in a.losses),
                 *((a.stats[n], b.stats[n]) for n in a.stats)):  # fmt: skip
        assert x.shape == y.shape
        assert torch.allclose(x.double(), y.double(), rtol=1e-9, atol=1e-11, equal_nan=True)
