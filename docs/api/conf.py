"""How the reference and the man page are built, from docstrings and the command line's own parser: see README.md."""

from __future__ import annotations

import incdump

project = "incdump"
author = "the incdump authors"
copyright = author  # noqa: A001 - Sphinx names it
version = release = incdump.__version__
today = " "  # nothing that is built says when: what is built of the same sources is the same

extensions = ["sphinx.ext.autodoc", "sphinx_click"]
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "alabaster"
html_theme_options = {"description": "Incremental memory dumps", "page_width": "75em", "sidebar_width": "16em"}
html_show_copyright = False

man_pages = [("command", "incdump", "incremental memory dumps of running process trees", "", 1)]
man_show_urls = True
