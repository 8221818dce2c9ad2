"""Links from inline code that names a public object to its place in the manual.

Pages write ``FAMO(every=10)`` as plain Markdown code, which a repository's view of them shows
as well. Code that names nothing documented stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

# A name, or a call of it: with brackets of one level inside, so that it is not two calls.
CALL = re.compile(r"([A-Za-z_][\w.]*)(\([^()]*(\([^()]*\)[^()]*)*\))?")
UNCHANGED = (nodes.title, nodes.reference, addnodes.desc)


def find_target(code: str, documented: Iterable[str], modules: Iterable[str]) -> str | None:
    """The full name of the object that the code names or calls, or None."""
    match = CALL.fullmatch(code)
    names = [match[1], *(f"{module}.{match[1]}" for module in modules)] if match else []
    return next((name for name in names if name in documented), None)


def link_code(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Turn inline code of a page's text into links, but in headings, links and docstrings."""
    if page in app.config.code_links_exclude:
        return
    objects = app.env.get_domain("py").objects
    outer = [node for kind in UNCHANGED for node in doctree.findall(kind)]
    unchanged = {id(code) for node in outer for code in node.findall(nodes.literal)}
    for code in list(doctree.findall(nodes.literal)):
        name = find_target(code.astext(), objects, app.config.code_links_modules)
        if name is not None and id(code) not in unchanged:
            home, anchor = objects[name].docname, objects[name].node_id
            code.replace_self(make_refnode(app.builder, page, home, anchor, code.deepcopy(), name))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("code_links_modules", [], "env", list)
    app.add_config_value("code_links_exclude", [], "env", list)
    app.connect("doctree-resolved", link_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
