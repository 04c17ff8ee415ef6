"""Damaged records and tensor files: an error that names the file, or a state that steps."""

from __future__ import annotations

import random
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from cases import METHODS, differing, snapshot
from clips import image, tiny_clip, tiny_ids

import fasttta
from fasttta.engine import folder as folders

RECORDS = 1500
PARTS = 6


@dataclass
class Saved:
    """A save, the model that it is of, and an adapted model that stays as it is."""

    model: Any
    batch: tuple
    folder: Path
    adapted: Any
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    from cases import tiny_model as _tiny

    def batch(seed):
        g = torch.Generator().manual_seed(seed)
        return torch.randn(5, 6, 8, generator=g), torch.randn(5, 3, 6, 6, generator=g)

    def guard():
        return fasttta.ShiftDetector(4)

    made: dict[str, tuple[Any, Any]] = {}
    for name in METHODS:
        model = _tiny()
        options = {} if name == "source" else {"guard": guard()}
        made[name] = model, fasttta.adapt(model, name, **METHODS[name], **options)
    model = _tiny()
    stats = fasttta.collect_stats(model, [batch(0), batch(1)])
    made["anchor"] = (
        model,
        fasttta.adapt(model, "abpem", anchor="source", source_stats=stats, **METHODS["abpem"]),
    )
    fisher = fasttta.collect_fisher(model, [batch(0)])
    made["fisher"] = model, fasttta.adapt(model, "eata", fisher=fisher, **METHODS["eata"])
    clip = tiny_clip()
    for name, options in (
        ("tpt", {"views": 4, "select": 0.5}), ("rada", {"heads": 3, "loss": "entropy"}),
        ("rada", {"heads": 3, "views": 4, "select": 0.5}), ("mta", {"views": 4}),
    ):  # fmt: skip
        made[f"clip {name} {len(made)}"] = (
            clip,
            fasttta.adapt(clip, name, classes=tiny_ids(), **options),
        )
    saves = []
    for name, (model, adapted) in made.items():
        images = name.startswith("clip")
        for seed in (1, 2, 3):
            adapted.step(*((image(seed),) if images else batch(seed)))
        folder = tmp_path_factory.mktemp("save")
        adapted.save(folder)
        weights = {n: x.clone() for n, x in model.state_dict().items()}
        saves.append(Saved(model, (image(4),) if images else batch(4), folder, adapted, weights))
    return saves


def damaged(saved: Saved, folder: Path, draw: random.Random) -> str:
    """Writes the save with something wrong in it; what that is."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved.folder, folder)
    record, tensors = damage.opened(folder)
    kind = draw.choice(("record", "record", "tensors", "tensors", "bytes", "text"))
    if kind == "record":
        what, record = damage.changed_record(record, draw)
        damage.closed(folder, record, tensors)
    elif kind == "tensors":
        what, tensors = damage.changed_tensors(tensors, draw)
        damage.closed(folder, record, tensors)
    elif kind == "bytes":
        file = folder / draw.choice((folders.RECORD, record["state"]))
        what, data = damage.changed_bytes(file.read_bytes(), draw)
        file.write_bytes(data)
    else:
        file = folder / folders.RECORD
        what, text = damage.changed_text(file.read_text(), draw)
        file.write_text(text)
    return f"{kind}: {what}"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_saves(saves, tmp_path, part):
    draw, refused, unnamed, accepted = random.Random(part), 0, 0, 0
    before = [snapshot(saved.adapted) for saved in saves]
    for _ in range(RECORDS // PARTS):
        saved = draw.choice(saves)
        what = f"{saved.adapted.options}: {damaged(saved, tmp_path / 'save', draw)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = fasttta.load(saved.model, tmp_path / "save")
            except ValueError as error:
                refused += 1
                unnamed += str(tmp_path) not in str(error)
                continue
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
            accepted += 1
            try:
                result = loaded.step(*saved.batch)
            except Exception as error:
                raise AssertionError(f"{what}: accepted, then {error!r}") from error
        assert torch.isfinite(result.logits).all(), what
        assert all(torch.isfinite(x).all() for x in loaded.tuned.values()), what
    assert refused > RECORDS // PARTS // 2
    assert not unnamed  # every error names the file
    assert accepted > 0
    for saved, state in zip(saves, before, strict=True):
        assert differing(state, saved.adapted) == []
        now = saved.model.state_dict()
        assert all(torch.equal(x, now[name]) for name, x in saved.weights.items())
