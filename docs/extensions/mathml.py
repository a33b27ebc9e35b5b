"""Formulas as MathML, made at build: a browser draws it by itself, so a page needs no script, no server and no fonts from elsewhere."""
from __future__ import annotations

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging

CONVERTER = LatexToMathML(fancy_error=False)
logger = logging.getLogger(__name__)


def mathml(node: nodes.Node, display: bool) -> str:
    """What cannot be converted is a warning, hence the end of the build."""
    try:
        return CONVERTER.convert_with_local_state(node.astext().strip(), displaystyle=display)
    except LatexError as error:
        logger.warning("%s: %s", error, node.astext(), location=node)
        return ""


def visit_math(writer, node: nodes.math) -> None:
    writer.body.append(mathml(node, display=False))
    raise nodes.SkipNode


def visit_math_block(writer, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{mathml(node, display=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
