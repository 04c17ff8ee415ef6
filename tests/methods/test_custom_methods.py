"""Methods that users write: complete or refused, run or refused, saved and loaded."""

from __future__ import annotations

import abc
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from cases import differing, same, snapshot
from clips import image, tiny_clip, tiny_ids
from places import SUPPORT

import fasttta
from fasttta import functional as F
from fasttta import methods
from fasttta.methods import Episodic, Method, Objective, Prediction, Seen
from fasttta.methods.base import runs_episodes
from fasttta.methods.episodic import unit


@dataclass(frozen=True)
class Gap(Method):
    """Entropy, and a running mean of predictions as state."""

    name: ClassVar[str] = "gap"
    group: ClassVar[str | None] = "fusion_qkv"
    frozen_encoder: ClassVar[bool] = True
    weights: tuple[float, ...] = (1.0, 0.5)
    lr: float = 1e-3

    def objective(self, model, features, *, state, constants, valid) -> Objective:
        logits = self.logits(model, features)
        entropy = self.weights[0] * F.entropy(logits).mean()
        p = logits.detach().softmax(-1).mean(0)
        mean = 0.5 * (state.get("mean", p) + p)
        return Objective({"total": entropy}, logits, len(logits), state={"mean": mean})


@dataclass(frozen=True)
class Counter(Method):
    """Tunes nothing; its state is the last batch itself."""

    name: ClassVar[str] = "counter"
    group: ClassVar[str | None] = None
    frozen_encoder: ClassVar[bool] = False

    def objective(self, model, features, *, state, constants, valid) -> Objective:
        seen = state.get("seen", torch.zeros((), dtype=torch.int64)) + len(features[0])
        state = {"seen": seen, "last": features[0]}
        return Objective({}, self.logits(model, features), 0, state=state)


@dataclass(frozen=True)
class Flip(Episodic):
    """The image as it is."""

    name: ClassVar[str] = "flip"
    prompt: str = "a photo of a"
    prompt_length: int | None = None
    lr: float = 0.0

    def forward(self, model, images) -> Seen:
        features = unit(model.encode_image(images.anchors()))
        logits = model.logit_scale.exp() * features @ images.text[0].T
        return Seen(features.unsqueeze(1), logits.unsqueeze(1))

    def predict(self, model, seen, state) -> Prediction:
        return Prediction(seen.logits[:, 0])


@dataclass(frozen=True)
class Drift(Episodic):
    """Pixels that move against the feature's length, which the losses of two steps tell."""

    name: ClassVar[str] = "drift"
    strategy: ClassVar[str] = "pixels"
    prompt: str = "a photo of a"
    prompt_length: int | None = None
    lr: float = 1e-3
    steps: int = 2

    def forward(self, model, images) -> Seen:
        seen = super().forward(model, images)
        seen.parts["pixels"] = images.anchors()
        return seen

    def start(self, images, seen):
        return torch.zeros_like(seen.parts["pixels"])

    def objective(self, model, features, *, state, constants, valid) -> Objective:
        lengths = model.encode_image(features.parts["pixels"] + state["tuned"]).norm(dim=1)
        past = [*state["lengths"].unbind(1)] if "lengths" in state else []
        state = {"lengths": torch.stack([*past, lengths.detach()], dim=1)}
        return Objective({"total": lengths}, features.logits[:, 0], len(lengths), state=state)

    def move(self, seen, added, grad):
        x = seen.parts["pixels"]
        return (x + added - self.lr * grad).clamp(0, 1) - x

    def predict(self, model, seen, state) -> Prediction:
        logits = seen.logits[:, 0]
        return Prediction(logits, {"lengths": state["lengths"], "added": state["tuned"]})


def test_saved_and_loaded_by_its_class(tiny_model, tiny_batch, tmp_path):
    model = tiny_model()
    adapted = fasttta.adapt(model, Gap(lr=1e-2))
    for seed in (1, 2):
        adapted.step(*tiny_batch(seed=seed))
    adapted.save(tmp_path)
    record = json.loads((tmp_path / "fasttta.json").read_text())
    assert record["class"] == f"{Gap.__module__}.Gap"
    with pytest.raises(ValueError, match=rf"fasttta\.load\(.*method={Gap.__module__}\.Gap\)"):
        fasttta.load(model, tmp_path)
    loaded = fasttta.load(model, tmp_path, method=Gap)
    assert differing(adapted, loaded) == []
    assert loaded.options == adapted.options  # a tuple again
    assert same(adapted.step(*tiny_batch(seed=3)), loaded.step(*tiny_batch(seed=3)))
    for wrong, error, match in (
        (Counter, ValueError, "saved with 'gap', method=Counter is 'counter'"),
        (methods.READ, ValueError, "saved with 'gap'"),
        (Gap(), TypeError, "method must be a subclass"),
        ("gap", TypeError, "method must be a subclass"),
        (torch.nn.Linear, TypeError, "method must be a subclass"),
        (methods.Method, TypeError, "method=Method has no name; it is a base of methods"),
    ):
        with pytest.raises(error, match=match):
            fasttta.load(model, tmp_path, method=wrong)
    built_in = fasttta.adapt(model, "read")
    built_in.save(tmp_path)
    assert "class" not in json.loads((tmp_path / "fasttta.json").read_text())
    assert differing(fasttta.load(model, tmp_path, method=methods.READ), built_in) == []


def test_a_record_imports_and_runs_nothing(tiny_model, tmp_path):
    """The path in a record is text: the module that it names must not be imported."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Gap: pass\n")
    model, folder = tiny_model(), tmp_path / "save"
    fasttta.adapt(model, Gap()).save(folder)
    import damage

    record, tensors = damage.opened(folder)
    record["class"] = "evil.Gap"
    damage.closed(folder, record, tensors)
    torch.save(model, tmp_path / "model.pt")
    code = (
        f"import sys, torch, fasttta; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"try: fasttta.load(model, {str(folder)!r})\n"
        "except ValueError as error: print(error)\n"
        "assert 'evil' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "method=evil.Gap" in out.stdout
    assert not (tmp_path / "ran").exists()


def test_a_class_of_the_main_module_is_saved(tmp_path):
    """In a script a method is __main__.Mine."""
    code = f"""
import sys; sys.path.insert(0, {str(SUPPORT)!r})
import dataclasses, torch, fasttta
from cases import tiny_model
from fasttta.methods import Method, Objective
@dataclasses.dataclass(frozen=True)
class Mine(Method):
    name = "mine"; group = None; frozen_encoder = True
    def objective(self, model, features, *, state, constants, valid):
        return Objective({{}}, self.logits(model, features), 0)
model = tiny_model()
fasttta.adapt(model, Mine()).save({str(tmp_path)!r})
print(type(fasttta.load(model, {str(tmp_path)!r}, method=Mine).options).__name__)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout == "Mine\n"


def test_one_that_tunes_nothing_and_keeps_a_batch(tiny_model, tiny_batch, tmp_path):
    """Its state is a copy: the caller may refill the batch."""
    model = tiny_model()
    adapted = fasttta.adapt(model, Counter())
    batch = tiny_batch()
    assert torch.equal(adapted.step(*batch).logits, model(*batch))
    before = snapshot(adapted)
    assert int(before["method.seen"]) == 5
    batch[0].zero_()
    assert differing(before, adapted) == []
    adapted.save(tmp_path)
    assert differing(fasttta.load(model, tmp_path, method=Counter), before) == []


def test_options_that_json_does_not_know(tiny_model, tmp_path):
    adapted = fasttta.adapt(tiny_model(), Gap(weights=(torch.ones(2), 1.0)))
    with pytest.raises(ValueError, match="options of 'gap' cannot be saved"):
        adapted.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_would_not_be_run_is_refused(tiny_model):
    """On a CLIP every image is an episode: a method without one gave zero-shot logits."""

    @dataclass(frozen=True)
    class Mine(Method):
        name = "mine"
        group = None
        frozen_encoder = True
        families = ("vision-language",)
        lr: float = 1e-3

        def objective(self, *args, **kwargs):
            raise RuntimeError("run")

    @dataclass(frozen=True)
    class Ours(methods.Source):
        """An objective that no image would see."""

        def objective(self, *args, **kwargs):
            raise RuntimeError("run")

    for method in (Mine(), Ours()):
        with pytest.raises(ValueError, match=r"is not run on .*CLIP.*Episodic and define predict"):
            fasttta.adapt(tiny_clip(), method, classes=tiny_ids())
    with pytest.raises(ValueError, match="'mine' adapts vision-language models, found"):
        fasttta.adapt(tiny_model(), Mine())
    with pytest.raises(ValueError, match="'gap' adapts fusion models, found"):
        fasttta.adapt(tiny_clip(), Gap(), classes=tiny_ids())
    with pytest.raises(ValueError, match="'flip' adapts vision-language models"):
        fasttta.adapt(tiny_model(), Flip())


def test_one_for_images(tmp_path):
    clip = tiny_clip()
    adapted = fasttta.adapt(clip, Flip(), classes=tiny_ids())
    source = fasttta.adapt(clip, "source", classes=tiny_ids())
    assert torch.equal(adapted.step(image(1)).logits, source.step(image(1)).logits)
    adapted.save(tmp_path)
    loaded = fasttta.load(clip, tmp_path, method=Flip)
    assert torch.equal(adapted.step(image(2)).logits, loaded.step(image(2)).logits)


def test_one_that_moves_pixels():
    adapted = fasttta.adapt(tiny_clip(), Drift(), classes=tiny_ids())
    result = adapted.step([image(1), image(2)])
    lengths = result.stats["lengths"]
    assert lengths.shape == (2, 2)
    assert (lengths[:, 1] < lengths[:, 0]).all()
    assert (result.stats["added"] != 0).any()
    assert adapted.step(image(2)).stats["lengths"].shape == (2,)  # no leading B of one image
    assert adapted.tuned == {}


def test_episodic_means_one_thing():
    """What the property says is what the class is, also where options decide."""
    for method in (
        methods.TPT(), methods.ATPT(), methods.MTA(), methods.TTC(), methods.RAda(loss="views"),
    ):  # fmt: skip
        assert runs_episodes(method)
        assert isinstance(method, Episodic)
    for method in (methods.RAda(loss="entropy"), methods.RAda(), methods.ABPEM(), methods.Source()):
        assert not runs_episodes(method)
        assert not isinstance(method, Episodic)
    assert not isinstance(methods.MTA(), methods.TPT)
    assert not isinstance("tpt", Episodic)


COMPLETE = {
    "name": "mine", "group": "norm", "frozen_encoder": False, "lr": 1e-3,
    "objective": lambda self, *args, **kwargs: None,
}  # fmt: skip


def test_a_missing_part_is_refused_when_the_class_is_made():
    type("Mine", (Method,), dict(COMPLETE))
    for part in COMPLETE:
        with pytest.raises(TypeError, match=rf"^Mine.* lacks {part}: needed ") as error:
            type("Mine", (Method,), {n: x for n, x in COMPLETE.items() if n != part})
        assert "\n" not in str(error.value)
    for part, value in (
        ("name", 3), ("name", " "), ("group", 5), ("frozen_encoder", "no"), ("families", ()),
        ("families", "fusion"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"^Mine\.{part} is "):
            type("Mine", (Method,), {**COMPLETE, part: value})
    parts = {
        "name": "mine", "predict": lambda *args: None, "prompt": "a", "prompt_length": None,
        "lr": 0.0,
    }  # fmt: skip
    made = type(Episodic)("Mine", (Episodic,), dict(parts))
    assert isinstance(made(), Episodic)
    for part in ("predict", "prompt", "prompt_length"):
        some = {name: value for name, value in parts.items() if name != part}
        with pytest.raises(TypeError, match=f"^Mine lacks .*{part}: needed"):
            type(Episodic)("Mine", (Episodic,), some)
    for strategy, part in (
        ("prompt", "objective"), ("pixels", "start"), ("pixels", "objective"), ("pixels", "move"),
    ):  # fmt: skip
        needed = {"start": made, "objective": made, "move": made, "strategy": strategy}
        del needed[part]
        with pytest.raises(TypeError, match=f"^Mine lacks {part}: needed for .*'{strategy}'"):
            type(Episodic)("Mine", (Episodic,), {**parts, **needed})
    with pytest.raises(TypeError, match="strategy is 'none of these': needed"):
        type(Episodic)("Mine", (Episodic,), {**parts, "strategy": "none of these"})


def test_a_class_with_options_is_a_dataclass():
    class Bare(Method):
        name = "bare"
        group = "norm"
        frozen_encoder = False
        strength: float = 1.0
        lr: float = 1e-3

        def objective(self, *args, **kwargs):
            raise RuntimeError

    with pytest.raises(TypeError, match=r"^Bare declares the options strength, lr .*@dataclass"):
        Bare()

    class Renamed(Gap):  # one that declares none needs no decorator
        name = "renamed"

    assert Renamed(lr=1e-2).lr == 1e-2


def test_frozen_encoders_give_their_layers_no_gradient():
    for group in ("norm", "encoder_norm", "prompts"):
        with pytest.raises(TypeError, match=f"tunes '{group}', .* frozen_encoder = False"):
            type("Mine", (Method,), {**COMPLETE, "group": group, "frozen_encoder": True})
    parts = {**COMPLETE, "frozen_encoder": True, "tuned": lambda self, model: {}}
    type("Mine", (Method,), parts)  # says itself what it tunes


class Count:
    """Not a tensor."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: None, r"Wrong.objective returned NoneType; needed fasttta.methods.Objective\("),
        (lambda o: o.losses["total"], "returned Tensor; needed fasttta.methods.Objective"),
        (lambda o: replace(o, losses={"e": o.losses["total"]}), "the losses 'e'; needed \"total\""),
        (lambda o: replace(o, losses={}), 'the losses none; needed "total"'),
        (lambda o: replace(o, losses={"total": 1.0}), "float as loss 'total'; needed a tensor"),
        (
            lambda o: replace(o, losses={"total": o.logits[0]}),
            r"'total' of shape \[7\]; needed one",
        ),
        (lambda o: replace(o, logits=None), r"NoneType as logits; needed a tensor \[B, C\]"),
        (lambda o: replace(o, logits=o.logits[0]), r"logits of shape \[7\]; needed \[B, C\]"),
        (lambda o: replace(o, n_used=None), "n_used=None; needed the number of samples"),
        (lambda o: replace(o, stats={"a": 1.0}), r"float as stats\['a'\]; needed a tensor"),
        (lambda o: replace(o, state={"a": Count()}), r"Count as state\['a'\]; needed a tensor"),
    ],
)
def test_a_wrong_objective_is_named(change, message, tiny_model, tiny_batch):
    @dataclass(frozen=True)
    class Wrong(Gap):
        def objective(self, model, features, **others) -> Objective:
            return change(super().objective(model, features, **others))

    adapted = fasttta.adapt(tiny_model(), Wrong())
    before = snapshot(adapted)
    with pytest.raises((TypeError, ValueError), match=message):
        adapted(*tiny_batch())
    assert not differing(before, adapted)


def test_bases_may_lack_parts():
    class Base(Method, abstract=True):
        group = "norm"
        frozen_encoder = False

    class Abstract(Base, abc.ABC):
        @abc.abstractmethod
        def loss(self): ...

    @dataclass(frozen=True, slots=True)
    class Slotted(Base, abstract=True):
        extra: int = 1

    @dataclass(frozen=True)
    class Whole(Abstract):
        name: ClassVar[str] = "whole"
        lr: float = field(default=1e-3)

        def loss(self) -> Any:
            return 1

        def objective(self, model, features, *, state, constants, valid):
            raise NotImplementedError

    assert Whole(lr=2e-3).lr == 2e-3
    with pytest.raises(TypeError, match="Half lacks name"):

        class Half(Base):
            pass


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("blank_state", "StatefulMethod"), ("check_saved", "StatefulMethod"),
        ("extend", "ExtendingMethod"), ("draw", "DrawingMethod"),
        ("single_sample", "WeightedMethod"), ("updates", "WeightedMethod"),
    ],
)  # fmt: skip
def test_a_member_of_a_narrower_base_is_refused_without_it(name, base):
    """Nothing would ever ask for it."""
    member = {name: lambda self, *args, **kwargs: None}
    with pytest.raises(TypeError, match=rf"defines {name}, .* needed the base .*\.{base}"):
        type("Mine", (Method,), COMPLETE | member)


def test_a_method_has_about_a_dozen_members():
    members = {name for name in vars(Method) if not name.startswith("_")}
    assert len(members | {"name", "group", "frozen_encoder"}) <= 15, sorted(members)
