"""The documentation: `sphinx-build -W -b html docs build/docs`, after `pip install ".[docs]"`.

The build reads nothing from the network. Formulae become MathML, so that the pages need no script
from elsewhere either. `python -m pytest docs README.md` runs the code blocks of the pages.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The docstrings come from this folder, and the compiled library from the installed package.
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from docutils import nodes  # noqa: E402
from sphinx.addnodes import pending_xref  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402
from sphinx.environment import BuildEnvironment  # noqa: E402

import ember_ext  # noqa: E402

project = "ember-ext"
author = "the ember-ext developers"
project_copyright = author
release = version = ember_ext.__version__

extensions = [
    "bench_tables",
    "mathml",
    "myst_parser",
    "paper_results",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_ext"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

# A name in single backticks links to what it names, and is plain code where it names nothing, such
# as an argument. Whoever writes a role, as in :class:`LIFGate`, is told of names that do not exist.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:.*", r"(torch|ncps|numpy|collections|typing|pathlib|optional)\b.*"),
    ("py:class", r"(Any|Callable|Generator|Iterable|Iterator|Literal|Mapping|NamedTuple|Path)"),
    ("py:class", r"(Self|Sequence|Tensor|Wiring|bool|dict|float|int|list|str|tuple|type)"),
    ("py:class", r"(CellName|EmberCondition|Hidden|LayerState|LiquidEmberCondition|LiquidLayer)"),
    (
        "py:class",
        r"(PersistenceMode|PresetName|RefractoryMode|.*\.Progress|.*\.State|os\.PathLike|tyro\..*)",
    ),
    ("py:exc", ".*(Error|Warning)"),
]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_admonition_for_examples = False
napoleon_use_ivar = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
# Lines of 95 characters of code fit.
html_theme_options = {
    "light_css_variables": {"code-font-size": "var(--font-size--small--3)"},
}
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["ember.css"]
html_math_renderer = "mathml"
html_show_sphinx = False


def _resolve_where_documented(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Node | None:
    """Link `ember_ext.ops.lif_gate` and the like to where it is documented, as `ember_ext`'s."""
    if node.get("refdomain") != "py":
        return None
    package, _, name = node["reftarget"].rpartition(".")
    if package not in ("ember_ext.ops", "ember_ext.nn"):
        return None
    domain = env.domains.python_domain
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], f"ember_ext.{name}", node, content
    )


def _keep_colons(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Keep napoleon from taking what stands before a colon for the type of an attribute."""
    if what in ("attribute", "data", "property") and lines:
        lines[:0] = ["..", ""]  # an empty comment


def _skip_bare_fields(
    app: Sphinx, what: str, name: str, thing: object, skip: bool, options: object
) -> bool | None:
    """Leave out the fields of named tuples that have no text of their own."""
    return True if str(thing.__doc__).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip_bare_fields)
    app.connect("missing-reference", _resolve_where_documented)
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # before napoleon
