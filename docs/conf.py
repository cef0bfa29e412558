"""Sphinx: `sphinx-build -W --keep-going -b html docs docs/_build/html` (the extra `docs` has what it needs)."""

from pathlib import Path

import bnfast
from bnfast.commands import gallery

HERE = Path(__file__).parent

project = "bnfast"
author = "The bnfast developers"
project_copyright = "The bnfast developers"
release = version = bnfast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_gallery"]

default_role = "py:obj"  # single backticks in docstrings are names
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, shapes and dtypes
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_theme = "furo"
html_title = f"bnfast {release}"


def draw_examples(app):
    """The gallery's figures, drawn anew by the code that is documented."""
    gallery.run(HERE / "_gallery")


def show_examples(app, docname, source):
    """Ends the gallery's page with all figures, their captions and scripts."""
    if docname == "gallery":
        for name in gallery.EXAMPLES:
            module = gallery.example(name)
            source[0] += f"""
## {module.TITLE}

![{module.TITLE}](_gallery/{name}.png)

{module.CAPTION}

:::{{admonition}} examples/{name}.py
:class: dropdown

```{{literalinclude}} ../examples/{name}.py
:language: python
```
:::
"""


def setup(app):
    app.connect("builder-inited", draw_examples)
    app.connect("source-read", show_examples)
