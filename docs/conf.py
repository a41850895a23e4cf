"""Configuration of Sphinx."""

from sb3_softq import __version__

project = "sb3_softq"
author = "The sb3_softq developers"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_shared"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "fieldlist"]
myst_heading_anchors = 3

# The parameters of a class are described in its docstring, their types stand in its constructor
autoclass_content = "class"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"sb3_softq {release}"
html_static_path = ["_static"]
copybutton_prompt_text = "$ "
