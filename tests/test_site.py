"""The guide as a site: it builds without a warning, works offline, and its search finds what people look for."""

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from places import ROOT

DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not (DOCS / "conf.py").is_file(), reason="the guide is not beside the installed tests")

# What people type, and the page that has to be among the first three.
SEARCHES = {
    "install": "install",
    "compiler": "install",
    "performance": "performance/index",
    "benchmark": "performance/measuring",
    "threads": "performance/threads",
    "OpenBLAS": "performance/beside",
    "freeze": "guide/training-and-eval",
    "momentum": "guide/training-and-eval",
    "inference": "guide/training-and-eval",
    "checkpoint": "guide/checkpoints",
    "save model": "guide/checkpoints",
    "distributed": "large/processes",
    "MPI": "large/processes",
    "Dask": "large/dask",
    "batch does not fit in memory": "large/parts",
    "mask": "guide/masks",
    "padding": "guide/masks",
    "channels last": "guide/shapes",
    "float16": "guide/half",
    "accumulate gradients": "guide/several-forwards",
    "ghost batches": "how-do-i",
    "calibrate": "guide/calibration",
    "ReLU": "guide/fused",
    "residual": "guide/fused",
    "StandardScaler": "guide/scaling",
    "gradient check": "guide/gradient-checks",
    "PyTorch": "coming-from/pytorch",
    "Keras": "coming-from/keras",
    "accuracy": "promises",
    "Spark": "large/recipes",
    "joblib": "large/recipes",
    "SyncBatchNorm": "deploy/torch",
    "convert model": "deploy/torch",
    "ONNX": "deploy/conventions",
    "fold convolution": "deploy/numpy",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; the examples' figures are left out."""
    for module in ("sphinx", "myst_parser", "numpydoc", "furo", "sphinx_design", "sphinx-mathjax-offline", "sklearn"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-D", "bnfast_gallery=0", "-d", str(folder / "doctrees")]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder / "html")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "html"


class Page(HTMLParser):
    """What a page loads (not: links to), its images' alternative texts, its captions, its kinds of elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.alts: list[str | None] = []
        self.elements: Counter[str] = Counter()
        self.relations: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements[tag] += 1
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"] or "")
        if tag == "link" and found.get("href"):
            relations = (found.get("rel") or "").split()
            self.relations.update(relations)
            if {"stylesheet", "icon", "preload"}.intersection(relations):
                self.loads.append(found["href"] or "")
        if tag == "img":
            self.alts.append(found.get("alt"))


@pytest.fixture(scope="module")
def pages(site):
    """{name: Page} of the guide's pages."""
    names = [path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")]
    found = {str(name): Page(site / f"{name}.html") for name in names if name.parts[0] not in ("_build", "_gallery")}
    assert len(found) > 30
    return found


# --- search ---


def search(site, query):
    """The names of the pages that the site's search finds, the best first.

    As searchtools.js counts: a word of a title 15, of a text 5, a part of one 7 and 2; all words must be there.
    """
    from sphinx.search.en import SearchEnglish

    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", (site / "searchindex.js").read_text("utf-8"))[1])
    language = SearchEnglish({})
    scores = Counter()
    found = []
    for word in language.split(query):
        stem = language.stem(word.lower())
        if word.lower() in language.stopwords:
            continue
        best = Counter()
        for table, whole, part in (("terms", 5, 2), ("titleterms", 15, 7)):
            for term, places in index[table].items():
                score = whole if term == stem else part if len(word) > 2 and word.lower() in term else 0
                for place in (places if isinstance(places, list) else [places]) if score else []:
                    best[place] = max(best[place], score)
        found.append(set(best))
        scores.update(best)
    names = set.intersection(*found)
    ranked = sorted(names, key=lambda place: (-scores[place], index["docnames"][place]))
    return [index["docnames"][place] for place in ranked]


@pytest.mark.parametrize(("query", "page"), SEARCHES.items(), ids=SEARCHES)
def test_a_search_leads_to_the_page(site, query, page):
    first = [name for name in search(site, query) if name not in ("api", "changelog")][:3]
    assert page in first


def test_a_search_may_find_nothing(site):
    assert search(site, "quaternion") == []


# --- offline, readable ---


def test_pages_load_nothing_from_elsewhere(site, pages):
    for name, page in pages.items():
        for target in page.loads:
            assert not re.match(r"(https?:)?//", target), (name, target)
            assert (site / name).parent.joinpath(target.partition("?")[0]).is_file(), (name, target)


def test_formulas_need_no_network(site, pages):
    assert any("mathjax" in target for target in pages["theory/mathematics"].loads)
    fonts = list((site / "_static/mathjax/output/chtml/fonts").rglob("*.woff"))
    assert len(fonts) > 10


def test_every_page_leads_to_its_neighbours_and_has_an_icon(pages):
    for name, page in pages.items():
        assert "icon" in page.relations, name
        assert {"prev", "next"} & page.relations, name


def test_scripts_of_the_examples_are_folded(pages):
    from bnfast.commands.gallery import EXAMPLES

    assert pages["examples"].elements["details"] == len(EXAMPLES)


def test_every_image_has_an_alternative_text(pages):
    for name, page in pages.items():
        for alt in page.alts:
            assert alt, name


def test_the_api_page_has_all_public_names(site):
    import bnfast

    text = (site / "api.html").read_text(encoding="utf-8")
    table = text[text.index('id="api-reference"') : text.index('id="the-layer"')]
    names = {f"bnfast.{name}" for name in bnfast.__all__ if name not in ("__version__", "functional")}
    names |= {f"bnfast.functional.{name}" for name in bnfast.functional.__all__}
    missing = {name for name in names if f'href="#{name}"' not in table}
    assert not missing
