"""Formulae as MathML, which browsers draw without a script; LaTeX that is wrong fails the build."""

from __future__ import annotations

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

LOGGER = logging.getLogger(__name__)

MACROS = {
    "R": r"\mathbb{R}",
    "diff": r"\mathrm{d}",
}
"""Commands that the pages may use beside those of LaTeX."""

CONVERTER = LatexToMathML(macros=MACROS)


def _mathml(node: nodes.math | nodes.math_block, *, display: bool) -> str:
    latex = node.astext()
    if display and r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    try:
        return CONVERTER.convert_with_local_state(latex, displaystyle=display)
    except LatexError as error:
        LOGGER.warning("formula %r: %s", latex, error, location=node)
        return ""


def _visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_mathml(node, display=False))
    raise nodes.SkipNode


def _visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    # Sphinx puts a numbered formula into a container that has its identifiers.
    number = get_node_equation_number(translator, node) if node["number"] else ""
    label = f'<span class="eqno">({number})</span>' if number else ""
    formula = _mathml(node, display=True)
    translator.body.append(f'<div class="formula">{label}{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer, which `html_math_renderer = "mathml"` chooses."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
