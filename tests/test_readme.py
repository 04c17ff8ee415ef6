"""READMEs: the first page's size, its examples, and that every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import tiny_model
from clips import tiny_clip, tiny_ids
from fusions import Joint
from places import README, ROOT

import fasttta

MOST_BYTES = 9000
ROOMS = ("fasttta", "kernels", "csrc", "benches", "tests")
FIRST_HOUR = ROOT / "benches/FIRST_HOUR.md"
PAGES = [
    README,
    *(page for room in ROOMS for page in sorted((ROOT / room).rglob("README.md"))),
    FIRST_HOUR,
]
SCRIPTS = [ROOT / ".ci/run", ROOT / ".ci/gpu", ROOT / ".ci/types"]
ADAPTED = ROOT / "fasttta/adapted/README.md"


def code_blocks(text: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """What a page links to; brackets in code are no links."""
    prose = re.sub(r"`[^`\n]*`", "", without_blocks(page.read_text()))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_page_is_short():
    size = len(README.read_bytes())
    assert size <= MOST_BYTES, f"README.md has {size} bytes: move something to a room's README"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for link in links(page):
        if re.match(r"\w+:", link):
            continue  # another site
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead, f"{page.relative_to(ROOT)} links to what is not there: {dead}"


def test_every_room_readme_is_linked_from_the_first_page():
    linked = {ROOT / link.partition("#")[0] for link in links(README)}
    unlinked = [str(page.relative_to(ROOT)) for page in PAGES[1:] if page not in linked]
    assert not unlinked


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_commands_name_are_there(path):
    """Of the repository, from its root: ``pytest tests/ops/test_x.py``, ``csrc/x.cpp``."""
    rooms = r"(?:tests|benches|\.ci|fasttta|kernels|csrc)"
    named = re.findall(rf"(?<![\w/.]){rooms}/[\w/.-]*\w", path.read_text())
    files = {name for name in named if name.endswith((".py", ".md", ".txt", ".cpp", ".h"))}
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


def test_the_first_hour_has_every_stage():
    script = (ROOT / ".ci/gpu").read_text()
    stages = re.findall(r"^  ([a-z |]+)\)", script.partition("case ${1:-} in")[2], re.MULTILINE)
    named = {name for line in stages for name in line.split(" | ")} - {"all", "benches"}
    assert len(named) > 8
    rows = re.findall(r"^\| `(\w+)` \|", FIRST_HOUR.read_text(), re.MULTILINE)
    assert set(rows) == named
    assert all(re.search(rf"^{name}\(\) ", script, re.MULTILINE) for name in named)


TABLE = re.compile(r"^\| file \|.*\n\| --- .*\n((?:\|.*\n)+)", re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES[1:] if TABLE.search(page.read_text())],
    ids=lambda page: str(page.parent.relative_to(ROOT)),
)
def test_tables_of_files_have_all_files(page):
    """A room's README that lists the room's files lists each of them, and no other."""
    rows = TABLE.search(page.read_text())[1].splitlines()
    listed = [name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    there = {path.name for path in page.parent.iterdir() if path.suffix in (".py", ".html", ".css")}
    assert sorted(listed) == sorted(there - {"__init__.py"})


def test_the_demo_table_is_the_demos():
    """The first page shows rows of the table in the demo's README, which its own tests check."""

    def table(page: Path) -> list[str]:
        shown = page.read_text().split("<!-- demo-table -->")[1].split("<!-- /demo-table -->")[0]
        return [line for line in shown.splitlines() if line.strip("`")]

    rows = table(README)
    assert len(rows) == 7  # streams, and a head
    assert set(rows) <= set(table(ROOT / "fasttta/demo/README.md"))


@pytest.fixture
def examples():
    """The first page's examples: audio-visual, CLIP, a model of one's own."""
    text = README.read_text().split("<!-- examples -->")[1].split("<!-- /examples -->")[0]
    blocks = code_blocks(text)
    assert len(blocks) == 3
    return blocks


def test_audio_visual_example(examples, tiny_batch, monkeypatch):
    monkeypatch.setattr(fasttta.models.CAVMAE, "from_checkpoint", lambda path: tiny_model())
    names: dict[str, Any] = {"stream": [tiny_batch(4, seed=1), tiny_batch(4, seed=2)]}
    exec(examples[0], names)
    assert names["adapted"].method == "abpem"
    assert names["logits"].shape == (4, 7)


def test_clip_example(examples, monkeypatch):
    """Class names go through a tokenizer of the tiny model's vocabulary."""
    monkeypatch.setattr(fasttta.models.CLIP, "from_checkpoint", lambda path: tiny_clip())
    text = re.sub(r'tokenizer="[^"]*"', "tokenizer=tokenizer", examples[1])
    assert text != examples[1]
    classes = {"a photo of a cat.": [5, 6, 7, 8, 20], "a photo of a dog.": [5, 6, 7, 8, 21]}
    names: dict[str, Any] = {
        "fasttta": fasttta,
        "names": ["cat", "dog"],
        "tokenizer": lambda texts: [[98, *classes[text], 99] for text in texts],
        "images": [torch.rand(3, 30, 40), torch.rand(3, 24, 24)],
    }
    exec(text, names)
    assert names["adapted"].method == "a-tpt"
    assert names["logits"].shape == (1, 2)


def test_example_of_a_model_of_ones_own(examples):
    """The spans are those of a model with a class token, 64 and 49 tokens."""
    model = Joint()
    model.position = torch.nn.Parameter(torch.randn(1, 114, 16))
    names: dict[str, Any] = {
        "fasttta": fasttta,
        "model": model.eval(),
        "audio": torch.randn(4, 128, 5),
        "video": torch.randn(4, 3, 21, 21),
    }
    exec(examples[2], names)
    assert names["output"].shape == (4, 6)


def test_stream_example(tiny_batch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = code_blocks(ADAPTED.read_text())
    adapted = fasttta.adapt(tiny_model(), "read")
    loader = [tiny_batch(4, seed=seed) for seed in (1, 2)]
    exec(block, {"fasttta": fasttta, "adapted": adapted, "loader": loader})
    assert capsys.readouterr().out.count("tensor(") == 2
    assert list((tmp_path / "features").iterdir())


class Projected(torch.nn.Module):
    """The model that the README of ModelSpec describes: 1 + 64 + 49 tokens."""

    class Attention(torch.nn.Module):
        """Attention with three projections."""

        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            q, k, v = (
                project(x).unflatten(2, (2, 8)).transpose(1, 2)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            attention = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
            return (attention @ v).transpose(1, 2).flatten(2)

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.video = torch.nn.Linear(5, 16), torch.nn.Linear(7, 16)
        self.token = torch.nn.Parameter(torch.randn(1, 1, 16))
        self.fusion, layer = torch.nn.Module(), torch.nn.Module()
        layer.self_attn = self.Attention()
        self.fusion.layers = torch.nn.ModuleList([layer])
        self.head = torch.nn.Linear(16, 9)

    def forward(self, audio, video):
        token = self.token.expand(len(audio), -1, -1)
        x = torch.cat([token, self.audio(audio), self.video(video)], dim=1)
        return {"logits": self.head(self.fusion.layers[0].self_attn(x).mean(dim=1))}


def test_examples_of_a_spec(capsys):
    """The model adapted by a spec, and the detection; the third example only shows a field."""
    text = (ROOT / "fasttta/models/specified/README.md").read_text()
    given, detected, _ = code_blocks(text)
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "fasttta": fasttta,
        "model": Projected().eval(),
        "audio": torch.randn(3, 64, 5),
        "video": torch.randn(3, 49, 7),
    }
    exec(given, names)
    assert names["output"]["logits"].shape == (3, 9)
    spans = names["spec"].spans
    with pytest.warns(UserWarning, match="class tokens"):
        exec(detected, names)
    assert tuple(names["spec"].spans.values()) == tuple(spans.values())
    assert "ModelSpec(" in capsys.readouterr().out


def test_examples_of_rada():
    """With heads of 4 channels, as the tiny models are narrower than published ones."""
    adapt, finetune = code_blocks((ROOT / "fasttta/models/rational/README.md").read_text())
    assert adapt.count("fasttta.adapt(") == 4
    assert finetune.count("fasttta.finetune(") == 2
    names: dict[str, Any] = {
        "fasttta": fasttta,
        "clip": tiny_clip(),
        "cavmae": tiny_model(),
        "names": tiny_ids(),
        "head": fasttta.models.RationalHead(12, heads=3),
        "text": torch.randn(5, 12),
        "FeatureClassifier": fasttta.models.FeatureClassifier,
    }
    exec(re.sub(r'((?:clip|cavmae), "rada")', r"\1, heads=3", adapt), names)
    assert names["adapted"](torch.randn(4, 12)).shape == (1, 5)  # four views of one image
    names |= {
        "RationalHead": fasttta.models.RationalHead,
        "ids": tiny_ids(),
        "images": torch.rand(6, 3, 24, 24),
        "labels": torch.arange(6),
        "features": torch.randn(6, 512),
        "text": torch.randn(6, 512),
    }
    exec(finetune.replace(".rational()", ".rational(heads=3)"), names)
    assert isinstance(names["tuned"], fasttta.models.RationalHead)


def test_example_of_backends():
    (block,) = code_blocks((ROOT / "kernels/README.md").read_text())
    exec(block, {"logits": torch.randn(3, 7)})
