"""Heads of the official RAda code: their names, their unused alpha, files of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from archives import save_script
from torch import nn

from fasttta.models import FeatureClassifier, RationalHead


def _head(dim=8, heads=2):
    torch.manual_seed(0)
    head = RationalHead(dim, heads)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


def _official():
    """An official head's state dict."""
    return {"alpha": torch.full((1,), torch.nan)} | {n: x for n, x in _head().state_dict().items()}


def _logits(head):
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(n, 8, generator=generator) for n in (3, 5))
    return head(image, text, 10.0)


def test_state_dicts_with_alpha():
    head = RationalHead(8, 2)
    head.load_state_dict(_official())
    assert torch.equal(_logits(head), _logits(_head()))
    holder = FeatureClassifier(RationalHead(8, 2), nnf.normalize(torch.randn(5, 8), dim=-1))
    state = {f"head.{n}": x for n, x in _official().items()} | {"text": holder.text}
    holder.load_state_dict(state)
    assert torch.equal(_logits(holder.head), _logits(_head()))


def test_what_a_head_refuses():
    head = RationalHead(8, 2)
    before = {n: x.clone() for n, x in head.state_dict().items()}
    official = _official()
    for changes, match in (
        ({"k_proj.bias": torch.full((8,), torch.nan)}, "k_proj.bias not finite"),
        ({"k_proj.bias": torch.zeros(8, dtype=torch.int64)}, "k_proj.bias int64"),
        ({"k_proj.bias": torch.zeros(7)}, r"width 8: found k_proj.bias \[7\]"),
        ({"odd": torch.zeros(7)}, r"found odd \[7\]"),
        ({"out_proj.bias": torch.empty(8, device="meta")}, "on the meta device"),
    ):
        with pytest.raises(ValueError, match=match):
            head.load_state_dict({**official, **changes})
    with pytest.raises(ValueError, match="found no v_proj.weight"):
        head.load_state_dict({n: x for n, x in official.items() if n != "v_proj.weight"})
    assert all(torch.equal(x, before[n]) for n, x in head.state_dict().items())
    for text, match in (
        (torch.full((3, 8), torch.nan), "text not finite"),
        (torch.empty(3, 8, device="meta"), "text on the meta device"),
        (torch.ones(3, 8).to_sparse(), "text sparse"),
    ):
        with pytest.raises(ValueError, match=match):
            FeatureClassifier(head, text)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.Module()
        for name in ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj"):
            setattr(self.mha, name, nn.Linear(8, 8))
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor):
        return x


def test_files(tmp_path):
    """Official names with any prefix, beside other tensors, in half precision, in TorchScript."""
    expected, path = _logits(_head()), tmp_path / "head.pth"
    official = _official()
    for saved, tolerance in (
        (official, 0),
        ({"state_dict": {f"module.mha.{n}": x for n, x in official.items()}, "epoch": 3}, 0),
        ({f"mha.{n}": x for n, x in official.items()} | {"prompt.ctx": torch.ones(2, 3)}, 0),
        ({n: x.half() for n, x in official.items()}, 2e-2),
    ):
        torch.save(saved, path)
        for source in (path, saved):
            head = RationalHead.from_checkpoint(source, heads=2)
            assert (head.dim, head.heads) == (8, 2)
            assert torch.allclose(_logits(head), expected, atol=tolerance, rtol=0)
    scripted = Scripted()
    head = RationalHead.from_checkpoint(save_script(scripted, tmp_path / "a.pt"))
    assert torch.equal(head.k_proj.weight, scripted.mha.k_proj.weight)
    for saved, match in (
        ({"a": torch.ones(1)}, "found 0 names that end in q_proj1.weight"),
        ({f"{p}.{n}": x for p in "ab" for n, x in official.items()}, "found 2 names"),
        ({**official, "q_proj1.weight": torch.ones(3)}, r"q_proj1.weight has shape \[3\]"),
        ({**official, "q_proj2.weight": torch.ones(3)}, r"found q_proj2.weight \[3\]"),
    ):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=match):
            RationalHead.from_checkpoint(path, heads=2)
    torch.save(official, path)
    with pytest.raises(ValueError, match="heads=3 does not divide"):
        RationalHead.from_checkpoint(path, heads=3)
