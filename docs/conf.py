"""Configuration of the site. CommonMark through MyST, so that pages read here as they do on a code host."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # formulas.py

project = "rattention"
copyright = "the rattention authors, Apache-2.0"
extensions = ["myst_parser", "formulas"]
root_doc = "index"
html_theme = "furo"
html_title = "rattention"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_use_index = False

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
