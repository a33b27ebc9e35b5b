"""The site: `make docs`. Nothing is fetched while it is built, and a page needs nothing but its files to be read."""
from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "refattn"
author = "the authors of refattn"
extensions = ["myst_nb", "pages", "sources", "mathml"]
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = "refattn"
html_static_path = ["static", str(files("ziamath") / "fonts")]        # STIX Two Math
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
smartquotes = False
highlight_language = "none"             # indented blocks are formulas as often as code; fenced ones name their language
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
myst_url_schemes = ["http", "https", "mailto", "source"]

nb_execution_mode = "force"             # a cache would not see that the library has changed
nb_execution_in_temp = True
nb_execution_timeout = 600              # for a machine that has other things to do
nb_execution_raise_on_error = True
nb_output_stderr = "error"
nb_merge_streams = True
