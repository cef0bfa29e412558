"""Sphinx: `sphinx-build -W --keep-going -b html docs html` (the extra `docs` has what it needs).

`-D bnfast_gallery=0` leaves out the examples' figures, which take most of the time.
"""

import importlib.util
import shutil
from pathlib import Path

import bnfast
from bnfast.commands import gallery
from bnfast.commands.bench import means

HERE = Path(__file__).parent
HISTORY_ALT = (
    "Six panels, a kind of call each: times of bnfast and PyTorch over the memory traffic's, by release and CPU"
)
RELEASES = means.releases(HERE.parent / "benchmarks/history")

project = "bnfast"
author = "The bnfast developers"
project_copyright = "The bnfast developers"
release = version = bnfast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_design",
]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_gallery"]

default_role = "py:obj"  # single backticks in docstrings are names
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, shapes and dtypes
autosummary_generate = False  # its tables only
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_theme = "furo"
html_title = f"bnfast {release}"
html_static_path = ["_static"]
html_css_files = ["bnfast.css"]
html_favicon = "_static/favicon.svg"
html_show_sphinx = False
html_copy_source = False  # else a second copy of every page

# The site works offline: MathJax lies in it, its program and fonts only (sphinx-mathjax-offline has 24 MB).
MATHJAX = ("tex-chtml.js", "output/chtml/fonts")
mathjax_path = "mathjax/tex-chtml.js"


def ship_mathjax(app, exception):
    """Copies MathJax into the site."""
    if exception is None and app.builder.format == "html":
        package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
        for name in MATHJAX:
            source, target = package / "static/mathjax" / name, Path(app.outdir, "_static/mathjax", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)


def draw_examples(app):
    """The gallery's figures, drawn anew by the code that is documented; the speed of all releases."""
    (HERE / "_gallery").mkdir(exist_ok=True)
    (HERE / "_gallery/history.png").write_bytes(means.draw_history(RELEASES))
    if app.config.bnfast_gallery:
        gallery.run(HERE / "_gallery")


def show_history(app, docname, source):
    """Ends the page on past releases with their figures."""
    if docname == "performance/history":
        source[0] += f"\n![{HISTORY_ALT}](../_gallery/history.png)\n"
        head, *rows = means.history(RELEASES)
        lines = [head, ["---"] * len(head), *rows]
        source[0] += "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def show_examples(app, docname, source):
    """Ends the examples' page with all figures, their captions and scripts."""
    if docname == "examples":
        for name in gallery.EXAMPLES:
            module = gallery.example(name)
            figure = f"![{module.ALT}](_gallery/{name}.png)" if app.config.bnfast_gallery else ""
            source[0] += f"""
## {module.TITLE}

{figure}

{module.CAPTION}

:::{{dropdown}} examples/{name}.py
```{{literalinclude}} ../examples/{name}.py
:language: python
```
:::
"""


def setup(app):
    app.add_config_value("bnfast_gallery", True, "env", types=[bool, str])
    app.connect("builder-inited", draw_examples)
    app.connect("source-read", show_examples)
    app.connect("source-read", show_history)
    app.connect("build-finished", ship_mathjax)
