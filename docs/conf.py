"""Sphinx configuration: Furo, MyST, the notebooks with their stored outputs, and pages of the API."""

from __future__ import annotations

import shutil
from pathlib import Path

from te_quant import __version__

HERE = Path(__file__).parent

# Sphinx reads only what lies in its folder. The notebooks lie with the examples, where people run them.
(HERE / "guides" / "notebooks").mkdir(exist_ok=True)
for notebook in (HERE.parent / "examples").glob("*.ipynb"):
    shutil.copy2(notebook, HERE / "guides" / "notebooks")

project = "te_quant"
author = "The te_quant authors"
project_copyright = "2026, the te_quant authors"
release = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"te_quant {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The outputs that the notebooks were committed with; `make notebooks` runs them.
nb_execution_mode = "off"
# Copying an example leaves its prompts and its output behind.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": True}
# Sections of our docstrings that napoleon does not know.
napoleon_custom_sections = [("Shape", "params_style"), "Source", "Cost"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
