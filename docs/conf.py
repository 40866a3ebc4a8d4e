"""How the documentation is built: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "nvcoll"
author = "the nvcoll developers"
copyright = f"2026, {author}"  # noqa: A001
release = version = importlib.metadata.version("nvcoll")

extensions = [
    "myst_parser",
    "nvcoll_table",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"nvcoll {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"  # `x` in a docstring is code

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give the types in words
napoleon_google_docstring = False
napoleon_use_rtype = False
