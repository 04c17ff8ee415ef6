"""Where golden vectors are looked for, and what is skipped without them."""

from __future__ import annotations

import goldens
import pytest

RUN = ("family/model.safetensors", "family/expected.safetensors")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Makes places of golden vectors that hold these files, the preferred one first."""

    def make(*held: tuple[str, ...]):
        made = []
        for i, names in enumerate(held):
            place = tmp_path / f"place{i}"
            for name in names:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).touch()
            made.append(place)
        monkeypatch.setattr(goldens, "places", lambda: made)
        return made

    return make


def test_files_of_a_run_come_from_one_place(folders):
    """Weights of one place never meet the values of another."""
    split, complete, _ = folders(RUN[:1], RUN, RUN)
    assert goldens.require(*RUN) == complete
    assert goldens.require(RUN[0]) == split


@pytest.mark.parametrize("held", [(), (RUN[:1], RUN[1:])])
def test_a_skip_names_the_files(folders, held):
    folders(*held)
    with pytest.raises(pytest.skip.Exception, match="model.safetensors") as reason:
        goldens.require(*RUN)
    assert "expected.safetensors" in str(reason.value)


def test_a_skip_names_what_is_missing_alone(folders):
    folders(RUN[:1])
    with pytest.raises(pytest.skip.Exception, match="expected.safetensors") as reason:
        goldens.require(*RUN)
    assert "model" not in str(reason.value)


def test_a_named_folder_is_the_first_place(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTTA_GOLDEN", str(tmp_path))
    assert goldens.places()[0] == tmp_path
    monkeypatch.setenv("FASTTTA_GOLDEN", str(tmp_path / "typo"))
    with pytest.raises(FileNotFoundError, match="typo"):
        goldens.places()


def test_a_clone_has_vectors_of_every_family(monkeypatch):
    """What is committed suffices for a run of each."""
    monkeypatch.setattr(goldens, "places", lambda: [goldens.ROOT / "tests" / "golden"])
    vit = [f"atpt/vit_{part}.safetensors" for part in ("model", "inputs", "expected_f64")]
    assert goldens.find("abpem/model.safetensors", "abpem/inputs.safetensors")
    assert goldens.find("atpt/golden.json", "atpt/kernels_f64.safetensors", *vit)
    assert goldens.find("brimpr/brimpr_small.safetensors", "brimpr/brimpr_small.json")
    assert goldens.find("rada/rada_ttt_composite.safetensors", "rada/rada_eft_warm.json")
    size = sum(path.stat().st_size for path in (goldens.ROOT / "tests" / "golden").rglob("*"))
    assert size < 20e6
