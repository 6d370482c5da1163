"""Sphinx's configuration of the documentation: ``make docs`` builds it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

from grap_solo import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NOTEBOOKS = DOCS / "notebooks"

project = "grap-solo"
author = "The grap-solo contributors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints", "results/**/summary.md", "results/**/map.md"]

html_theme = "furo"
html_title = f"grap-solo {release}"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
highlight_language = "text"
smartquotes = False  # They turn the dashes of a flag such as --heads into one.

nb_execution_mode = "off"  # The notebooks are shown as committed.
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # Would be loaded from another server.
myst_enable_extensions: list[str] = []  # No formulas: MathJax would be loaded from another server.
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True

# A reference without a target is a warning. Other projects' names have none: their inventories
# would have to be downloaded.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|omegaconf|numpy|np|lightning|pl|os|pathlib|typing)\..*"),
    ("py:.*", r"(Tensor|DictConfig|Any|tuple\[str|BaseMethod|MomentumUpdater)"),
]

LINK = re.compile(r"\[([^][]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def copy_notebooks(app: Sphinx) -> None:
    """Copies the notebooks into this folder, since Sphinx reads no page from outside it."""
    NOTEBOOKS.mkdir(exist_ok=True)
    for old in NOTEBOOKS.glob("*"):
        old.unlink()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, NOTEBOOKS)


def adapt_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adapts the links of a page, which are written for GitHub, to this site."""
    page = Path(str(app.env.doc2path(docname)))

    def adapt(link: re.Match[str]) -> str:
        text, path, fragment = link[1], Path(link[2]), link[3] or ""
        target = (page.parent / path).resolve()
        if (target / "README.md").is_file():  # A folder, which GitHub shows with its README.md.
            return f"[{text}]({path / 'README.md'}{fragment})"
        if target.parent == ROOT / "notebooks":
            return f"[{text}]({os.path.relpath(NOTEBOOKS / target.name, page.parent)})"
        if target.is_file() and not target.is_relative_to(DOCS):
            return f"{{download}}`{text.replace('`', '')} <{path}>`"
        return link[0]

    if page.suffix == ".md":
        source[0] = LINK.sub(adapt, source[0])


def show_formulas_as_written(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Makes each indented paragraph of a docstring, such as a formula, a literal block."""
    for i in range(len(lines) - 1, 1, -1):
        before, above = lines[i - 2], lines[i - 1]
        text = before and not before.startswith((" ", "- ", "..")) and not before.endswith("::")
        if lines[i].startswith("    ") and not above and text:
            lines[i:i] = ["::", ""]


def resolve_by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node
) -> nodes.Node | None:
    """Resolves a reference by an inherited name, or by the module of a name that is documented as
    the package's, if one object alone has that last name."""
    if node.get("refdomain") != "py":
        return None
    last = node["reftarget"].rpartition(".")[2]
    domain = env.domains.python_domain
    found = [name for name in domain.objects if name.rpartition(".")[2] == last]
    if len(found) != 1:
        return None
    entry = domain.objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content)


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", adapt_links)
    # Before Napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", show_formulas_as_written, priority=400)
    app.connect("missing-reference", resolve_by_last_name)
