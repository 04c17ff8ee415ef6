"""1,000 damaged, changed and hostile checkpoints: an error that is documented, or a sound model."""

from __future__ import annotations

import pickle
import resource

import pytest
import torch
from archives import writes
from damaged_checkpoints import MUTATIONS, Fuzz, code, members, nested, renamed
from torch import nn

from fasttta import SourceStats
from fasttta.methods import EATA
from fasttta.models import CAVMAE, CLIP, RationalHead
from fasttta.models.clip.checkpoint import is_clip_checkpoint

CASES = 1000
_READERS = {
    "cav-mae": lambda path: CAVMAE.from_checkpoint(path, num_heads=3),
    "clip": CLIP.from_checkpoint,
    "head": lambda path: RationalHead.from_checkpoint(path, heads=2),
    "statistics": SourceStats.from_official,
    "saved statistics": SourceStats.load,
    "fisher": EATA.fisher_from_official,
    "is a clip": is_clip_checkpoint,
}
_DOCUMENTED = (ValueError, TypeError, OSError)


def _sound(result) -> bool:
    """Whether what was read can be used: finite floating point values."""
    if isinstance(result, nn.Module):
        return all(torch.isfinite(x).all() for x in result.parameters())
    return True


def _run(f: Fuzz, mutation, seeds) -> tuple[int, int]:
    refused = 0
    for seed in seeds:
        f.seed(seed)
        mutation(f)
        readers = {name for name in _READERS if f.random.random() < 0.25} | {f.kind}
        for name in sorted(readers):
            case, message = f"{mutation.__name__}, seed {seed}, {name}", None
            try:
                assert _sound(_READERS[name](f.path)), case
            except _DOCUMENTED as error:
                message = str(error)
            except BaseException as error:
                raise AssertionError(case) from error
            if message is not None:
                refused += 1
                assert message, case
                assert "weights_only" not in message, case
        assert not f.marker.exists(), f"{mutation.__name__}, seed {seed}: code was run"
    return refused, len(seeds)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = CAVMAE(
        7, dim=12, num_heads=3, audio_tokens=6, video_tokens=4, depth=(1, 1, 1),
        patch_audio=(4, 2), patch_video=(3, 3), hidden=20,
    )  # fmt: skip
    return Fuzz(tmp_path_factory.mktemp("fuzz"), model)


def _memory() -> int:
    """Peak of the process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_few(made, mutation):
    refused, count = _run(made, mutation, range(5))
    assert count == 5
    assert refused or mutation in (nested, renamed, members)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_thousand(made, mutation):
    before, share = _memory(), -(-CASES // len(MUTATIONS))
    refused, count = _run(made, mutation, range(1000, 1000 + share))
    assert count * len(MUTATIONS) >= CASES
    assert refused > count // 10
    assert _memory() - before < 2**30
    if mutation is code:  # which does run when it is loaded without care
        made.seed(0)
        made.path.write_bytes(pickle.dumps(writes(made.marker)))
        pickle.loads(made.path.read_bytes())
        assert made.marker.exists()
        made.marker.unlink()
