"""How far a reader follows a call: files that it enters and moves from one file to another.

Both are counted on tiny models with a profile of Python's calls. They only grow when a change adds
a hop that everyone who reads a step has to take: raise a limit on purpose, not by accident.
`pytest tests/test_journeys.py -s` prints the counts.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from clips import image, tiny_clip, tiny_ids

import fasttta

PACKAGE = str(Path(fasttta.__file__).resolve().parent)


class Journey:
    """A call's way through the package.

    Attributes:
        files: calls into each file.
        moves: how often a call is of another file than the call before it.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self.files: Counter[str] = Counter()
        self.moves, last = 0, ""

        def profile(frame, event, _argument) -> None:
            nonlocal last
            file = frame.f_code.co_filename
            if event != "call" or not file.startswith(PACKAGE):
                return
            self.files[file] += 1
            self.moves += last not in ("", file)
            last = file

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            run()
        finally:
            sys.setprofile(before)

    def __str__(self) -> str:
        files = "\n".join(
            f"  {calls:5d} {file.removeprefix(PACKAGE)[1:]}"
            for file, calls in self.files.most_common()
        )
        return f"{len(self.files)} files, {self.moves} moves\n{files}"


def _adapt_fusion(model, batch):
    fasttta.adapt(model, "abpem")
    return lambda: fasttta.adapt(model, "abpem")


def _step(name):
    def prepared(model, batch):
        adapted = fasttta.adapt(model, name)
        for _ in range(5):  # the window of ABPEM is full, modules are checked
            adapted(*batch)
        return lambda: adapted(*batch)

    return prepared


def _image(name, **options):
    def prepared(_model, _batch):
        adapted = fasttta.adapt(tiny_clip(), name, classes=tiny_ids(), views=4, **options)
        picture = image(0)
        adapted.step(picture)
        return lambda: adapted.step(picture)

    return prepared


# name -> (what is called, most files, most moves)
JOURNEYS = {
    # 9 is the aim. The rest keeps users' models safe: refused weights, hooks and wrappers, the
    # copy for the comparison with the model's own forward, the watch and its checksums
    "adapt": (_adapt_fusion, 16, 50),
    "abpem": (_step("abpem"), 16, 110),
    "tent": (_step("tent"), 16, 110),
    # 20 is the aim
    "a-tpt": (_image("a-tpt", select=0.5), 24, 150),
    "rada": (_image("rada", heads=3, select=0.5), 24, 150),
}


@pytest.mark.parametrize("name", JOURNEYS)
def test_files_and_moves(name, tiny_model, tiny_batch):
    prepare, most_files, most_moves = JOURNEYS[name]
    journey = Journey(prepare(tiny_model(), tiny_batch()))
    print(f"\n{name}: {journey}")
    assert len(journey.files) > 3
    assert len(journey.files) <= most_files, str(journey)
    assert most_moves is None or journey.moves <= most_moves, str(journey)


def test_a_move_is_counted(tiny_model, tiny_batch):
    """A call of one file is a journey without moves; one that enters two files has one."""
    import fasttta.models.cavmae.model as model_file

    model = tiny_model()
    batch = tiny_batch()
    model(*batch)
    assert Journey(lambda: model.spans).moves == 0
    journey = Journey(lambda: model(*batch))
    assert journey.moves >= 1
    assert model_file.__file__ in journey.files
