"""Configuration of the site. CommonMark through MyST, so that pages read here as they do on a code host."""

project = "rattention"
copyright = "the rattention authors, Apache-2.0"
extensions = ["myst_parser"]
root_doc = "index"
html_theme = "furo"
html_title = "rattention"
html_copy_source = False
html_show_sphinx = False
html_use_index = False

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
# `$2$` must not open mathematics in the middle of a word, as on a code host.
myst_dmath_allow_digits = False
