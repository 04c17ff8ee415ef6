"""Projected gradient descent: the official run, the ball, restarts, what is reported."""

import json

import pytest
import torch
from clips import ClipGolden

from fasttta.data.attack import ThreatModel, pgd
from fasttta.models import CLIP

# Signs of gradients decide, so the images of the official run come out bit for bit; logits have
# the rounding of a scale of 100 (measured 4e-5 and 6e-14).
TOLERANCES = {
    torch.float32: {"pixels": 0.0, "logits": 2e-4},
    torch.float64: {"pixels": 0.0, "logits": 1e-10},
}


def _linear(seed=0, size=5, classes=4):
    """A differentiable classifier of [B, 3, size, size] with a curved loss."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, 3 * size * size, generator=generator)
    return lambda x: 3 * (x.flatten(1) @ weight.to(x).T + (x**2).flatten(1) @ weight.to(x).T.cos())


def _images(n=3, size=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=generator)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def clip():
    """The official tiny ViT, its inputs and what the official attack made of the anchor."""
    golden = ClipGolden("vit")
    expected = {torch.float32: golden.expected["fp32"], torch.float64: golden.expected["fp64"]}
    return CLIP, golden.state_dict(), golden.inputs, expected, golden.config["label"]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_official_attack(clip, dtype):
    cls, state, inputs, expected, label = clip
    model = cls.from_checkpoint(state).to(dtype).set_classes(inputs["tokenized_prompts"])
    anchor = (inputs["bases_u8"][:1].float() / 255).to(dtype)  # float64 runs start from float32
    start = expected[torch.float32]["pgd.start_noise"].to(dtype)
    expected = expected[dtype]
    attacked = pgd(model, anchor, torch.tensor([label]), steps=3, step_size=1 / 255, start=start)
    tolerance = TOLERANCES[dtype]
    assert (attacked.pixels - expected["pgd.adv"]).abs().max() <= tolerance["pixels"]
    assert (attacked.logits - expected["pgd.logits_adv"]).abs().max() <= tolerance["logits"]
    assert (model(anchor) - expected["pgd.logits_clean"]).abs().max() <= tolerance["logits"]
    assert attacked.threat.label_source == "true"


def test_text_is_encoded_once(clip, monkeypatch):
    cls, state, inputs, _, label = clip
    model = cls.from_checkpoint(state).set_classes(inputs["tokenized_prompts"])
    monkeypatch.setattr(cls, "encode_text", lambda *_: pytest.fail("text encoded again"))
    anchor = inputs["bases_u8"][:1] / 255.0
    attacked = pgd(model, anchor, torch.tensor([label]), steps=2)
    assert attacked.pixels.shape == anchor.shape
    assert all(x.grad is None for x in model.parameters())


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_stays_in_the_ball_and_the_box(dtype):
    classify, images = _linear(), _images().to(dtype)
    images[0, 0, :2], images[1, 1, 3:] = 0.0, 1.0
    before = images.clone()
    labels = classify(images).argmax(1)
    eps = 0.03
    attacked = pgd(classify, images, labels, eps=eps, steps=20, generator=_generator())
    assert (attacked.pixels - images).abs().max() <= eps + 1e-6
    assert attacked.pixels.min() >= 0
    assert attacked.pixels.max() <= 1
    assert attacked.pixels.dtype == dtype
    assert torch.equal(images, before)
    loss = torch.nn.functional.cross_entropy
    assert loss(attacked.logits, labels) > loss(classify(images), labels)
    assert torch.equal(attacked.success, attacked.logits.argmax(1) != labels)
    assert torch.equal(attacked.logits, classify(attacked.pixels))


def test_one_step_is_the_signed_gradient():
    classify, images = _linear(), _images().double() * 0.5 + 0.25
    labels = torch.tensor([0, 1, 3])
    x = images.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(classify(x), labels)
    (gradient,) = torch.autograd.grad(loss, x)
    attacked = pgd(classify, images, labels, eps=0.1, step_size=0.02, steps=1)
    assert (attacked.pixels - (images + 0.02 * gradient.sign())).abs().max() < 1e-15


def test_images_of_a_batch_do_not_see_each_other():
    classify, images = _linear(), _images(5).double()
    labels = torch.tensor([0, 1, 2, 3, 0])
    start = torch.rand(images.shape, generator=_generator(), dtype=torch.float64) * 0.02 - 0.01
    together = pgd(classify, images, labels, steps=5, start=start)
    for i in (4, 0, 2):
        rows = slice(i, i + 1)
        alone = pgd(classify, images[rows], labels[rows], steps=5, start=start[rows])
        assert torch.equal(alone.pixels, together.pixels[rows])


def test_restarts_never_lose():
    classify, images = _linear(), _images(6)
    labels = classify(images).argmax(1)
    settings = {"eps": 0.01, "steps": 2}
    one = pgd(classify, images, labels, generator=_generator(), **settings)
    five = pgd(classify, images, labels, generator=_generator(), restarts=5, **settings)
    loss = torch.nn.functional.cross_entropy
    before = loss(one.logits, labels, reduction="none")
    after = loss(five.logits, labels, reduction="none")
    assert (five.success >= one.success).all()
    assert ((after >= before) | (five.success > one.success)).all()
    assert (after > before).any()


def test_seeded():
    classify, images, labels = _linear(), _images(), torch.tensor([0, 1, 2])
    first = pgd(classify, images, labels, steps=2, generator=_generator(3))
    again = pgd(classify, images, labels, steps=2, generator=_generator(3))
    other = pgd(classify, images, labels, steps=2, generator=_generator(4))
    clean = pgd(classify, images, labels, steps=0)
    noise = pgd(classify, images, labels, steps=0, generator=_generator(3))
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, other.pixels)
    assert torch.equal(clean.pixels, images)
    assert 0 < (noise.pixels - images).abs().max() <= 4 / 255 + 1e-7
    assert not clean.threat.random_start
    assert noise.threat.random_start


def test_pseudo_label():
    classify, images = _linear(), _images()
    by_hand = pgd(classify, images, classify(images).argmax(1), steps=3)
    attacked = pgd(classify, images, "pseudo", steps=3)
    assert torch.equal(attacked.pixels, by_hand.pixels)
    assert torch.equal(attacked.labels, by_hand.labels)
    assert (attacked.threat.label_source, by_hand.threat.label_source) == ("pseudo", "true")


def test_labels_are_plain():
    classify, images = _linear(), _images()
    labels = classify(images).argmax(1)
    with pytest.raises(TypeError, match="labels is a sparse COO tensor.*to_dense"):
        pgd(classify, images, labels.to_sparse(), steps=1)


def test_eight_bit():
    classify, images, labels = _linear(), _images(), torch.tensor([0, 1, 2])
    plain = pgd(classify, images, labels, steps=3)
    cut = pgd(classify, images, labels, steps=3, eight_bit=True)
    assert torch.equal(cut.pixels, (plain.pixels * 255).floor() / 255)
    assert torch.equal(cut.logits, classify(cut.pixels))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_outside(mode):
    classify, images, labels = _linear(), _images(), torch.tensor([0, 1, 2])
    expected = pgd(classify, images, labels, steps=3)
    with mode():
        attacked = pgd(classify, images.clone(), labels.clone(), steps=3)
    assert torch.equal(attacked.pixels, expected.pixels)


def test_threat_model_is_stated():
    threat = pgd(_linear(), _images(), "pseudo", steps=7, eps=1 / 255, generator=_generator(),
                 restarts=2, knowledge="everything").threat  # fmt: skip
    assert ThreatModel(**json.loads(threat.to_json())) == threat
    for part in ("PGD-7", "L-infinity", "eps 1/255", "step 0.25/255", "random start",
                 "2 restarts", "pseudo label", "everything"):  # fmt: skip
        assert part in str(threat)
    assert "nothing of an adaptation" in str(pgd(_linear(), _images(), "pseudo", steps=0).threat)


IMAGES, LABELS = _images(), torch.tensor([0, 1, 2])
NAN = IMAGES.clone()
NAN[0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps is -0.1; needed"),
        ({"eps": torch.nan}, ValueError, "eps is nan"),
        ({"eps": 4}, ValueError, "eps is 4; needed at most 1.*eps=4 / 255"),
        ({"step_size": -1.0}, ValueError, "step_size is -1"),
        ({"steps": -1}, ValueError, "steps is -1"),
        ({"restarts": 0}, ValueError, "restarts is 0"),
        ({"restarts": 2}, ValueError, "restarts is 2 without a generator"),
        ({"pixels": IMAGES[0]}, ValueError, r"pixels has shape \[3, 5, 5\]"),
        ({"pixels": IMAGES[:, :2]}, ValueError, r"pixels has shape \[3, 2, 5, 5\]"),
        ({"pixels": IMAGES[:0]}, ValueError, r"\[0, 3, 5, 5\].*none empty"),
        ({"pixels": [IMAGES]}, TypeError, "pixels is a list"),
        ({"pixels": IMAGES.half()}, TypeError, "pixels is torch.float16"),
        ({"pixels": IMAGES - 0.5}, ValueError, "pixels has pixels from -.*already normalised"),
        ({"pixels": NAN}, ValueError, "from nan"),
        ({"labels": LABELS[:2]}, ValueError, r"labels is torch.int64 with shape \[2\]"),
        ({"labels": LABELS.float()}, ValueError, "labels is torch.float32"),
        ({"labels": LABELS + 3}, ValueError, "labels run from 3 to 5; needed 0 to 3"),
        ({"labels": "true"}, ValueError, "labels is 'true'"),
        ({"start": IMAGES[:1]}, ValueError, r"start is \[1, 3, 5, 5\]"),
        ({"classify": lambda x: x}, ValueError, r"classify returned \[3, 3, 5, 5\]"),
        ({"classify": lambda x: None}, ValueError, "classify returned NoneType"),
        ({"classify": lambda x: _linear()(x.detach())}, ValueError, "without a gradient"),
        ({"classify": lambda x: _linear()(x) / 0}, ValueError, "NaN or infinity"),
    ],
)
def test_errors(change, error, message):
    arguments = {"classify": _linear(), "pixels": IMAGES, "labels": LABELS, "steps": 1, **change}
    with pytest.raises(error, match=message):
        pgd(**arguments)


def test_a_misclassified_start_goes_before_one_of_larger_loss():
    clean, labels = torch.full((2, 3, 2, 2), 0.5), torch.tensor([0, 0])
    right, wrong = (torch.tensor(p).log() for p in ([0.37, 0.33, 0.30], [0.45, 0.55, 1e-6]))
    assert right[0] < wrong[0]  # the larger loss

    def classify(x):
        up = (x[:, 0, 0, 0] > 0.5)[:, None]
        return torch.where(up, wrong, right) + 0 * x.sum((1, 2, 3))[:, None]

    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        options = {"eps": 0.1, "steps": 0, "generator": generator}
        result = pgd(classify, clean, labels, restarts=12, **options)
        assert result.success.all()
        assert (result.pixels[:, 0, 0, 0] > 0.5).all()


def test_a_start_is_cut_to_the_ball():
    clean = torch.full((1, 3, 2, 2), 0.5)
    start = torch.linspace(-1, 1, 12).view(1, 3, 2, 2)
    result = pgd(lambda x: x.flatten(1), clean, "pseudo", eps=0.1, steps=0, start=start)
    assert torch.allclose(result.pixels, clean + start.clamp(-0.1, 0.1))
