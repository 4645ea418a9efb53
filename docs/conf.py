"""How Sphinx builds the documentation: `make docs`."""

import re
from importlib import metadata

project = "jaxmerge"
author = "the jaxmerge authors"
version = release = metadata.version("jaxmerge")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "sphinx_book_theme"
html_title = "jaxmerge"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # the notebook is kept without outputs; they are made when the documentation is
nb_execution_timeout = 120
nb_execution_raise_on_error = True

autodoc_typehints = "none"  # the docstrings say it in words, with shapes
autodoc_member_order = "bysource"
napoleon_use_rtype = False
default_role = "literal"  # docstrings are written with single backticks


def as_restructured_text(_app, _what, _name, _obj, _options, lines):
    """Docstrings use `$...$` for formulas and name papers as `arXiv 2306.01708`, which reads well in a terminal."""
    text = re.sub(r"\$([^$]+)\$", lambda formula: f":math:`{' '.join(formula[1].split())}`", "\n".join(lines))
    lines[:] = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"`arXiv \1 <https://arxiv.org/abs/\1>`__", text).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text)
