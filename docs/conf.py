"""Sphinx configuration of the documentation: `make docs` builds it without a network."""

import importlib
import re
import sys
from pathlib import Path

from docutils import nodes

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent / "_ext")]
sys.dont_write_bytecode = True

import flowgen  # noqa: E402

project = "flowgen"
author = "flowgen contributors"
version = release = flowgen.__version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "generated",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"flowgen {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

default_role = "code"  # docstrings write code between single backquotes
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# Names of other packages, and types that flowgen does not document
nitpick_ignore_regex = [
    ("py:.*", r"(?!flowgen\.).*"),
]


def escape_bars(app, what, name, obj, options, lines) -> None:
    """Keep |x| in docstrings as it is: reStructuredText would look for a substitution."""
    for index, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("`")
            parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
            lines[index] = "`".join(parts)


def drop_docstring_of_torch(app, what, name, obj, options, lines) -> None:
    """Leave out the text that `forward` without a docstring inherits from torch.nn.Module."""
    if lines and lines[0].startswith("Define the computation performed at every call"):
        lines.clear()


def keep_values_on_one_line(app, doctree) -> None:
    """Break no line of a table inside `<= 1.146 ± 0.003` or `arXiv 1807.03039`."""
    for entry in doctree.findall(nodes.entry):
        for text in list(entry.findall(nodes.Text)):
            unbroken = re.sub(r"(?<=<=) | (?=±)|(?<=±) |(?<=arXiv) ", "\N{NO-BREAK SPACE}", text)
            text.parent.replace(text, nodes.Text(unbroken))


def keep_undocumented_names(app, env, node, content):
    """Show a name of flowgen without a page as plain text if it exists, and warn otherwise."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if node.get("refdomain") != "py" or not module.startswith("flowgen"):
        return None
    try:
        return content if hasattr(importlib.import_module(module), name) else None
    except ImportError:
        return None


def setup(app) -> None:
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-docstring", drop_docstring_of_torch)
    app.connect("doctree-read", keep_values_on_one_line)
    app.connect("missing-reference", keep_undocumented_names)
