"""Sphinx configuration."""

from __future__ import annotations

import os
import re
from importlib import metadata
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

project = "keras_distill"
author = "the keras_distill contributors"
release = metadata.version("keras-distill")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
# The notebook is executed when the site is built; its outputs are not kept elsewhere.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # what TensorFlow says when it starts
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# `name` in a docstring is code.
default_role = "code"
templates_path = ["_templates"]
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Docstrings of Keras's own methods belong to Keras's site.
autodoc_inherit_docstrings = False
napoleon_use_ivar = True  # fields of a named tuple are described once
napoleon_custom_sections = [("Call arguments", "params_style")]

html_theme = "pydata_sphinx_theme"
html_title = "keras_distill"
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2}


def _markdown(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Turns the Markdown of a docstring, code blocks and formulas, into reST."""
    text = re.sub(
        r"^( *)\$\$(.+?)\$\$",
        lambda m: f"{m[1]}.. math::\n\n{m[1]}   " + " ".join(m[2].split()) + "\n",
        "\n".join(lines),
        flags=re.DOTALL | re.MULTILINE,
    )
    lines.clear()
    inside = False
    for line in text.split("\n"):
        fence = re.fullmatch(r"( *)```(\w*)", line)
        if fence:
            inside = not inside
            start = f"{fence[1]}.. code-block:: {fence[2] or 'text'}"
            lines.extend([start, ""] if inside else [""])
        else:
            lines.append(f"   {line}" if inside and line else line)


def setup(app: Any) -> None:
    """Hooks."""
    app.connect("autodoc-process-docstring", _markdown)
