"""Tensors that no model can use are refused, by name."""

from __future__ import annotations

import pytest
import torch

from fasttta.files import check_weights
from fasttta.files.inert_pickle import Unreadable

UNFIT = {
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quant"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "on the meta device": (lambda: torch.empty(2, device="meta"), "meta"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
    "complex64": (lambda: torch.ones(2, dtype=torch.complex64), "complex64"),
    "int8": (lambda: torch.ones(2, dtype=torch.int8), "int8"),
    "not finite": (lambda: torch.tensor([0.0, torch.nan]), "not finite"),
    "infinite": (lambda: torch.tensor([0.0, -torch.inf]).half(), "not finite"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNFIT)
def test_unfit_tensors_are_named(tmp_path, tiny_model, kind):
    """In a state dict and in a file; the first, and how many more."""
    from clips import tiny_clip

    from fasttta.models import CAVMAE, CLIP, RationalHead

    make, match = UNFIT[kind]
    for model, load, first, second in (
        (tiny_model(), CAVMAE.from_checkpoint, "norm_a.bias", "norm_v.bias"),
        (tiny_clip(), CLIP.from_checkpoint, "ln_final.weight", "ln_final.bias"),
        (RationalHead(8), RationalHead.from_checkpoint, "q_proj1.bias", "k_proj.bias"),
    ):
        state = dict(model.state_dict()) | {first: make(), second: make()}
        order = [name for name in state if name in (first, second)]
        sources = [state]
        torch.save(state, tmp_path / "a.pt")
        sources.append(tmp_path / "a.pt")
        for source in sources:
            with pytest.raises(ValueError, match=rf"{order[0]} .*{match}.*\(and 1 more\)"):
                load(source)


def test_defects():
    check_weights({"a": torch.ones(2), "b": torch.zeros(0), "c": torch.ones(1).double()}, "x")
    check_weights({"a": torch.ones(2, dtype=torch.int32)}, "x", floating=False)
    with pytest.raises(ValueError, match="x: needed floating point weights, found a quantised"):
        check_weights({"a": Unreadable("quantised")}, "x")

    class Sub(torch.Tensor):
        pass

    with pytest.raises(ValueError, match="found a a Sub"):
        check_weights({"a": torch.ones(2).as_subclass(Sub)}, "x")
