"""Sphinx: `sphinx-build -W --keep-going -b html docs docs/_build/html` (the extra `docs` has what it needs)."""

from pathlib import Path

import bnfast

project = "bnfast"
author = "The bnfast developers"
project_copyright = "The bnfast developers"
release = version = bnfast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

default_role = "py:obj"  # single backticks in docstrings are names
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, shapes and dtypes
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_theme = "furo"
html_title = f"bnfast {release}"


def list_examples(app, docname, source):
    """Ends the gallery's page with a list of docs/gallery/*.md, if there are any."""
    examples = sorted(path.stem for path in Path(__file__).parent.glob("gallery/*.md"))
    if docname == "gallery" and examples:
        source[0] += "\n".join(
            ["```{toctree}", ":maxdepth: 1", "", *(f"gallery/{name}" for name in examples), "```", ""]
        )


def setup(app):
    app.connect("source-read", list_examples)
