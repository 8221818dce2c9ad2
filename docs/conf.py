"""Sphinx configuration; the site builds with warnings as errors."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import moo_balance

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "moo_balance"
author = "The moo_balance authors"
copyright = f"2026, {author}"
version = release = moo_balance.__version__

extensions = [
    "code_links",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "paper"]
html_theme = "furo"
html_title = f"moo_balance {version}"
html_static_path = ["_static"]
html_css_files = ["manual.css"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
copybutton_exclude = ".linenos, .gp, .go"

# Names of other projects are not resolved: reading their inventories would need a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|typing|numpy)(\..*)?"),
    (r"py:.*", r"(Tensor|Optimizer|Mapping|Sequence|Callable|Iterable|Iterator|ClassVar|Literal)"),
    (r"py:class", r"RowAverager"),  # an internal class, the type of one field of `Problem`
    (r"py:class", r"os\.PathLike|Figure"),
]

PUBLIC_MODULES = (
    "moo_balance",
    "moo_balance.engine",
    "moo_balance.functional",
    "moo_balance.integrations",
    "moo_balance.weighting",
)


code_links_modules = list(PUBLIC_MODULES)
# Their code also names parameters, or objects of other libraries, that are called as ours.
code_links_exclude = ["coming_from", "errors", "recipes/nequip_potential", "torchjd"]


def refuse_undocumented_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, and so fail the build, for each public name that no page documents."""
    documented = env.get_domain("py").objects
    for module in PUBLIC_MODULES:
        for name in importlib.import_module(module).__all__:
            if not any(f"{home}.{name}" in documented for home in PUBLIC_MODULES):
                message = "public name %s.%s is on no page"
                logging.getLogger(__name__).warning(message, module, name)


def setup(app: Sphinx) -> None:
    app.connect("env-check-consistency", refuse_undocumented_names)
