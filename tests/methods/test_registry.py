"""Names of methods: registered ones and those of installed packages."""

from __future__ import annotations

import abc
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cases import differing

import fasttta
from fasttta import functional as F
from fasttta import methods
from fasttta.commands.inspect import describe
from fasttta.demo.run import run as run_demo
from fasttta.methods import Method, Objective, registry

SOURCE = """
from dataclasses import dataclass
from fasttta.methods import Method, Objective

@dataclass(frozen=True)
class Mine(Method):
    name = "mine"
    group = None
    frozen_encoder = True

    def objective(self, model, features, *, state, constants, valid):
        return Objective({}, self.logits(model, features), 0)
"""


@pytest.fixture
def _clean(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_warned", set())


def sharpened(name: str = "sharpened") -> type[Method]:
    """A class of a method that minimises entropies, made anew."""

    @dataclass(frozen=True)
    class Sharpened(Method):
        name: ClassVar[str] = "sharpened"
        group: ClassVar[str | None] = "fusion_qkv"
        frozen_encoder: ClassVar[bool] = True
        lr: float = 1e-3

        def objective(self, model, features, *, state, constants, valid) -> Objective:
            logits = self.logits(model, features)
            return Objective({"total": F.entropy(logits).mean()}, logits, len(logits))

    Sharpened.name = name
    return Sharpened


@pytest.mark.usefixtures("_clean")
def test_a_registered_method_is_known_everywhere(tiny_model, tiny_batch, tmp_path):
    cls = sharpened()
    assert methods.register(cls) is cls
    assert "sharpened" in methods.names()
    assert "sharpened" in methods.names("fusion")
    assert "sharpened" not in methods.names("vision-language")
    model = tiny_model()
    adapted = fasttta.adapt(model, "sharpened", lr=1e-2)
    adapted.step(*tiny_batch())
    adapted.save(tmp_path)
    assert "class" not in json.loads((tmp_path / "fasttta.json").read_text())
    assert differing(fasttta.load(model, tmp_path), adapted) == []
    assert describe(model)["methods"]["sharpened"]["names"] == list(adapted.tuned)
    results = run_demo(["white"], ["source", "sharpened"], samples=16, batch=8)
    assert set(results["streams"]["white"]) == {"source", "sharpened"}


@pytest.mark.usefixtures("_clean")
def test_a_save_from_before_the_registration(tiny_model, tmp_path):
    """The record names the class: once that is registered, ``load`` finds it."""
    cls, model = sharpened(), tiny_model()
    adapted = fasttta.adapt(model, cls())
    adapted.save(tmp_path)
    with pytest.raises(ValueError, match=r"load does not import.*or register it"):
        fasttta.load(model, tmp_path)
    methods.register(cls)
    assert differing(fasttta.load(model, tmp_path), adapted) == []


@pytest.mark.usefixtures("_clean")
def test_what_is_refused():
    cls = methods.register(sharpened())
    assert methods.register()(sharpened()) is not cls  # made again, as in a notebook
    assert methods.by_name("sharpened") is not cls
    with pytest.raises(ValueError, match=r"'abpem' belongs to fasttta\.methods\.abpem\.ABPEM.*Sh"):
        methods.register(sharpened("abpem"))
    for thing in (torch.nn.Linear, "abpem", cls()):
        with pytest.raises(TypeError, match=r"needed a subclass of fasttta\.methods\.Method"):
            methods.register(thing)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="Method has no name; it is a base"):
        methods.register(Method)

    @dataclass(frozen=True)
    class Unfinished(Method, abc.ABC):
        name = "unfinished"
        group = None
        frozen_encoder = True

        @abc.abstractmethod
        def objective(self, *args, **others) -> Objective: ...

    class Base(sharpened("base"), abstract=True): ...  # type: ignore[misc, call-arg]

    for base in (Unfinished, dataclass(frozen=True)(Base)):
        with pytest.raises(TypeError, match=rf"{base.__name__} is abstract; it is a base"):
            methods.register(base)
        assert base.name not in methods.names()
    with pytest.raises(ValueError, match="'auto', with which adapt chooses a method"):
        methods.register(sharpened("auto"))

    @dataclass(frozen=True)
    class Needing(Method):
        name = "needing"
        group = None
        frozen_encoder = True
        strength: float

        def objective(self, *args, **others) -> Objective:
            raise RuntimeError

    with pytest.raises(TypeError, match="the option strength of Needing has no default"):
        methods.register(Needing)

    @dataclass(frozen=True)
    class Seeded(Needing):
        strength: float = 1.0
        seed: int = 0

    with pytest.raises(TypeError, match="the option seed of Seeded has the name of a keyword of a"):
        methods.register(Seeded)
    keywords = set(inspect.signature(fasttta.adapt).parameters) - {"options"}
    assert keywords == registry._KEYWORDS
    with pytest.raises(ValueError, match="method='nothing' is unknown; known: 'source', 'tent'"):
        methods.by_name("nothing")


def package(folder, name: str, source: str, *entries: str) -> None:
    """An installed distribution with one module and entry points."""
    (folder / f"{name}.py").write_text(source)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fasttta.methods]\n" + "\n".join(entries) + "\n")


def python(folder, code: str) -> str:
    """What a fresh process prints, which has the folder on its path."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], check=True, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_installed_packages_are_imported_when_asked_for(tmp_path):
    package(tmp_path, "offering", SOURCE, "mine = offering:Mine")
    out = python(
        tmp_path,
        "import fasttta\n"
        "print(fasttta.methods.by_name('tent').name, 'offering' in sys.modules)\n"
        "print(fasttta.methods.by_name('mine').__name__, 'offering' in sys.modules)\n"
        "print(fasttta.methods.names()[-1])",
    )
    assert out == "tent False\nMine True\nmine\n"


def test_a_broken_package_is_named_and_breaks_nothing(tmp_path):
    package(tmp_path, "broken", "import no_such_module", "worse = broken:Worse")
    package(tmp_path, "leaving", "raise SystemExit(3)", "gone = leaving:Gone")
    package(tmp_path, "renamed", SOURCE, "other = renamed:Mine")
    package(tmp_path, "taking", SOURCE.replace('"mine"', '"tent"'), "tent = taking:Mine")
    out = python(
        tmp_path,
        "import fasttta\n"
        "print(fasttta.methods.by_name('tent').__module__)\n"
        "names = fasttta.methods.names(); fasttta.methods.names()\n"
        "print(names[:2], 'worse' in names)\n"
        "try: fasttta.methods.by_name('worse')\n"
        "except ValueError as error: print(error)",
    )
    assert "fasttta.methods.tent" in out
    assert "['source', 'tent'] False" in out
    assert out.count("UserWarning: method 'worse': broken:Worse of broken cannot be used") == 1
    assert "No module named 'no_such_module'" in out
    assert "method='worse': broken:Worse of broken cannot be used: ModuleNotFoundError" in out
    assert "method 'gone': leaving:Gone of leaving cannot be used: SystemExit: 3" in out
    assert "method 'other': renamed:Mine of renamed cannot be used: TypeError: the class has" in out
    assert "'tent' belongs to fasttta.methods.tent.Tent already, so taking.Mine cannot" in out


def test_two_packages_with_one_name(tmp_path):
    package(tmp_path, "one", SOURCE, "mine = one:Mine")
    package(tmp_path, "two", SOURCE, "mine = two:Mine")
    out = python(
        tmp_path,
        "import fasttta\n"
        "try: fasttta.methods.by_name('mine')\n"
        "except ValueError as error: print(error)",
    )
    assert "method='mine': two packages offer it:" in out
    for text in ("one:Mine of one", "two:Mine of two"):
        assert text in out


@pytest.mark.parametrize(
    ("base", "missing"),
    [
        (methods.DrawingMethod, "draw"), (methods.ExtendingMethod, "extend"),
        (methods.TwoPassMethod, "second_objective"), (methods.WeightedMethod, "weights"),
    ],
)  # fmt: skip
def test_what_a_base_needs_is_missing(base, missing):
    with pytest.raises(
        TypeError, match=f"Lacking lacks {missing}: needed from a .*{base.__name__}"
    ):

        class Lacking(base):
            name = "lacking"
            group = None
            frozen_encoder = True

            def objective(self, *args, **others) -> Objective:
                raise RuntimeError
