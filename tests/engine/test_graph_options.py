"""Every option that changes a step, on static buffers as a CUDA graph replays them, against eager
steps: full, partial and one-sample batches. tests/engine/test_graph.py has ABPEM's windows."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from cases import METHODS, buffered, close, tiny_model

import fasttta
from fasttta import methods
from fasttta.methods.sar import SAR

SIZES = (5, 3, 1, 4)


# what is set beside METHODS, by method; every option of a class but those in UNTOUCHED
OPTIONS = {
    "source": [{"score_at": "after"}],
    "tent": [{"steps": 3}, {"score_at": "after"}],
    "read": [{"steps": 3}, {"score_at": "before"}],
    "eata": [
        {"steps": 2}, {"score_at": "after"}, {"e_margin": None}, {"e_margin": 1e-3},
        {"d_margin": 0.05}, {"d_margin": 2.0}, {"fisher": True},
        {"fisher": True, "fisher_weight": 0.0},
    ],
    "sar": [
        {"steps": 2}, {"score_at": "after"}, {"e_margin": None}, {"e_margin": 1e-3}, {"rho": 0.5},
        {"reset_below": 3.0}, {"reset_below": 3.0, "steps": 2},
    ],
    "abpem": [
        {"window": 1, "score_at": "before"}, {"window": 2, "k": 7}, {"anchor": "source"},
        {"anchor": "source", "heads": "each"}, {"heads": "each", "window": 1},
        {"pair": "query", "window": 1}, {"balance": "softmax-sum", "window": 1},
        {"entropy_weight": 0.0}, {"balance_weight": 0.0}, {"attention_weight": 0.0},
        {"steps": 2, "window": 1},
    ],
    "brimpr": [
        {"steps": 2}, {"score_at": "after"}, {"prompts": (1, 1)}, {"mask_ratio": 0.0},
        {"temperature": 1.0}, {"teacher_scale": 0.0, "teacher_offset": 0.0},
        {"alignment_weight": 0.0}, {"recombination_weight": 0.0}, {"contrast_weight": 0.0},
    ],
    "rada": [
        {"steps": 2}, {"score_at": "before"}, {"score_at": "after"}, {"tune": "out"},
        {"weight_decay": 0.5}, {"temperature": 2.0, "scale_multiplier": 2.0},
    ],
}  # fmt: skip
# of images alone, or the step does not depend on them
UNTOUCHED = {"lr", "heads", "loss", "select", "views", "augment", "prompt"}
CASES = [(name, options) for name, cases in OPTIONS.items() for options in cases]


def _name(x):
    return x if isinstance(x, str) else ",".join(f"{n}={v}" for n, v in x.items())


def test_every_option_has_a_case():
    for name in methods.names("fusion"):
        options = {field.name for field in fields(methods.by_name(name))}
        tried = {option for case in OPTIONS[name] for option in case} | METHODS[name].keys()
        if name == "source":
            options -= {"steps"}
        assert options - tried - UNTOUCHED == set(), name


@pytest.mark.filterwarnings("ignore:.*single sample")
@pytest.mark.parametrize("window", [1, 2])
def test_single_samples(tiny_batch, method, window):
    """A stream of them: the captured batch holds one row."""
    options = {"window": window} if method == "abpem" else {"steps": window}
    _compare(tiny_batch, method, {} if method == "source" else options, (1, 1))


@pytest.mark.filterwarnings("ignore:.*single sample")
@pytest.mark.parametrize(("method", "options"), CASES, ids=_name)
def test_same_as_eager(tiny_batch, method, options):
    _compare(tiny_batch, method, options, SIZES)


def _compare(tiny_batch, method, options, sizes):
    options = {**METHODS[method], **options}
    model = tiny_model().double()
    data = [tiny_batch(seed=30 + s, dtype=torch.float64) for s in range(2)]
    if options.get("fisher"):
        options["fisher"] = fasttta.collect_fisher(model, data, n=10)
    if options.get("anchor") == "source":
        options["source_stats"] = fasttta.collect_stats(model, data, n=10)
    eager = fasttta.adapt(model, method, **options)
    graph = buffered(fasttta.adapt(model, method, **options))
    for seed, size in enumerate(sizes):
        batch = tiny_batch(size, seed=seed, dtype=torch.float64)
        a, b = graph.step(*batch), eager.step(*batch)
        close(a, b)
        assert len(a.logits) == size
    for name, x in eager.tuned.items():
        assert torch.allclose(x, graph.tuned[name], rtol=1e-9, atol=1e-11), name
    assert len(graph._step.plans) == 1


def test_a_result_that_is_memory_of_the_state(tiny_model, tiny_batch, monkeypatch):
    """Results are copied when a step has ended: before, it writes the state for the next batch."""
    second = SAR.second_objective

    def shows_the_state(self, *arguments, state):
        objective, recover = second(self, *arguments, state=state)
        objective.stats["before"] = state.get("average", torch.tensor(-1.0))
        return objective, recover

    monkeypatch.setattr(SAR, "second_objective", shows_the_state)
    adapted = buffered(fasttta.adapt(tiny_model(), "sar", **METHODS["sar"]))
    stats = [adapted.step(*tiny_batch(seed=i)).stats for i in range(3)]
    assert stats[0]["before"] == -1
    assert [x["before"] for x in stats[1:]] == [x["average"] for x in stats[:-1]]
    assert stats[0]["average"] != stats[1]["average"]
