"""Run all scripts of ``examples/``, which are installed as `bnfast.examples`, and show their figures on a page.

``python -m bnfast gallery DIR`` writes eight figures and ``index.html`` into a folder.
"""

import argparse
import importlib
from html import escape
from pathlib import Path
from types import ModuleType

from .common import EXTRAS, ended, require

__all__ = ["EXAMPLES", "example", "main", "page", "run"]

EXAMPLES = (
    "directional_derivative",
    "feature_scaling",
    "learning_rate",
    "vanishing_gradients",
    "initialisation",
    "test_time_statistics",
    "covariate_shift",
    "data_parallel",
)


def example(name: str) -> ModuleType:
    """Return the script of an example: it has TITLE, CAPTION, ALT, compute, draw and main."""
    return importlib.import_module(f"bnfast.examples.{name}")


def page() -> str:
    """Return the HTML that shows all figures, which lie beside it, with their captions."""
    sections = []
    for name in EXAMPLES:
        module = example(name)
        title, caption, alt = (escape(text) for text in (module.TITLE, module.CAPTION, module.ALT))
        sections.append(
            f'<section id="{name}">\n<h2>{title}</h2>\n<div><img src="{name}.png" alt="{alt}"></div>\n'
            f"<p>{caption}</p>\n<p><code>examples/{name}.py</code></p>\n</section>"
        )
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>bnfast: the gallery</title>
<style>
body {{ max-width: 60em; margin: 2em auto; padding: 0 1em; font: 1.05em/1.5 sans-serif; color: #222; background: #fff }}
img {{ max-width: 100%; height: auto }}
div {{ overflow-x: auto }}
@media (max-width: 46em) {{ img {{ max-width: none; width: 40rem }} }}
@media (prefers-color-scheme: dark) {{ body {{ color: #ddd; background: #1a1a1a }} }}
section {{ margin-bottom: 3em }}
</style>
</head>
<body>
<h1>What batch normalisation does, on real data</h1>
<p>Lines are medians of three seeds, shades all that lies between them, unless a figure shows one run.</p>
{body}
</body>
</html>
"""


def run(folder: Path) -> None:
    """Write all figures and the page into a folder, which is made if it is not there."""
    require(list(EXTRAS))
    folder.mkdir(parents=True, exist_ok=True)
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    with tqdm(EXAMPLES, unit="figure", disable=None) as bar, threadpool_limits(1, user_api="blas"):
        for name in bar:  # more threads do not help with matrices this small
            bar.set_description(name)
            example(name).main(folder)
    (folder / "index.html").write_text(page(), encoding="utf-8")
    print(f"{len(EXAMPLES)} figures: {folder / 'index.html'}")


def main(argv: list[str]) -> int:
    """Run the gallery.

    Parameters
    ----------
    argv : list of str
        The arguments after ``python -m bnfast gallery``.

    Returns
    -------
    int
        The exit code: 0, 1 if a package is missing or the folder cannot be written, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser("python -m bnfast gallery", description="Run all examples and show their figures.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write eight figures and index.html")
    args = parser.parse_args(argv)
    return ended("gallery", lambda: run(args.folder))
