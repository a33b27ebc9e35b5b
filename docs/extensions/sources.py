"""Every file of source as a page, with a number on every line to link to.

In Markdown a link to a file of the repository leads there, as does `source:refattn/linear.py#L12`; names in backticks too: `refattn.linear_attention`
to the reference, `refattn/linear.py` to the file, `test_constant_values_pass_through` to the law. A name in a heading or in a link stays as it is.
"""
from __future__ import annotations

import ast
import html
import posixpath
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import reference
from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("refattn/**/*", "tests/*.py", "examples/*", "docs/extensions/*.py", "docs/conf.py", "setup.cfg", "Makefile", "LICENSE")
SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h", ".cfg", ""}


@cache
def sources() -> dict[str, Path]:
    """Path from the root -> file."""
    found = (path for room in ROOMS for path in sorted(ROOT.glob(room)))
    return {path.relative_to(ROOT).as_posix(): path for path in found if path.is_file() and path.suffix in SUFFIXES}


@cache
def laws() -> dict[str, str]:
    """Name of a test -> file#line."""
    return {node.name: f"{name}#L{node.lineno}" for name, path in sources().items() if name.startswith("tests/test_")
            for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def page_of(target: str) -> str | None:
    """Path from the root, of a file or a folder, with or without #line -> page name and anchor, or None where there is no such page."""
    path, _, line = target.partition("#")
    path = path.rstrip("/")
    if path.startswith("docs/interactive/"):                       # a page that is no page of Sphinx's: copied as it is
        return path.removeprefix("docs/")
    if path in sources():
        return f"source/{path}.html" + (f"#{line}" if line else "")
    if any(name.startswith(f"{path}/") for name in sources()):
        return f"source/{path}/index.html"
    return None


class NamesBecomeLinks(SphinxTransform):
    default_priority = 700

    def apply(self, **options: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            if isinstance(literal.parent.parent, nodes.entry):
                parts = re.findall(r"[^._]*[._]+|[^._]+$", text)
                literal[:] = [piece for part in parts for piece in (nodes.Text(part), nodes.raw("", "<wbr>", format="html"))][:-1]
            parents = (nodes.reference, addnodes.pending_xref, addnodes.download_reference, nodes.title, addnodes.desc_signature)
            ancestor, name = literal.parent, text
            while ancestor is not None and not isinstance(ancestor, parents):
                ancestor = ancestor.parent
            if ancestor is not None:
                continue
            if name in reference.names():
                link: nodes.Element = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=reference.names()[name], refexplicit=True,
                                                            refwarn=True, refdoc=self.env.docname)
            elif name in laws():
                link = nodes.reference("", "", refuri=f"source:{laws()[name]}", internal=False)
            elif "/" in name and page_of(name):
                link = nodes.reference("", "", refuri=f"source:{name}", internal=False)
            else:
                continue
            literal.replace_self(link)
            link += literal


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for node in doctree.findall(nodes.reference):
        uri = node.get("refuri", "")
        if uri.startswith("source:"):
            page = page_of(uri.removeprefix("source:"))
            if page is None:
                raise LookupError(f"{docname} links to {uri}, and there is no such file among the sources")
            node["refuri"] = posixpath.relpath(page, posixpath.dirname(docname) or ".")
            node["classes"] = [*node.get("classes", []), "source"]


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """For Sphinx: (page name, its context, its template)."""
    folders: dict[str, set[str]] = {}
    for name, path in sources().items():
        try:
            lexer = get_lexer_for_filename(name)
        except ClassNotFound:
            lexer = TextLexer()
        formatter = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)
        body = highlight(path.read_text(encoding="utf-8"), lexer, formatter)
        body = re.sub(r'(id|name|href)="(#?)L-(\d+)"', r'\1="\2L\3"', body)
        yield f"source/{name}", {"title": name, "body": f"<h1><code>{html.escape(name)}</code></h1>{body}"}, "page.html"
        parts = name.split("/")
        for i, part in enumerate(parts):
            folders.setdefault("/".join(parts[:i]), set()).add(part)
    for folder, inside in folders.items():
        title = folder or "Sources"
        links = {name: f"{name}.html" if posixpath.join(folder, name) in sources() else f"{name}/index.html" for name in sorted(inside)}
        items = "".join(f'<li><a href="{to}"><code>{name}</code></a></li>' for name, to in links.items())
        yield posixpath.join("source", folder, "index"), {"title": title, "body": f"<h1>{title}</h1><ul>{items}</ul>"}, "page.html"


def copy(app: Sphinx, error: Exception | None) -> None:
    if error is None and (ROOT / "docs" / "interactive").is_dir():
        shutil.copytree(ROOT / "docs" / "interactive", Path(app.outdir) / "interactive", dirs_exist_ok=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(NamesBecomeLinks)
    app.connect("doctree-resolved", resolve)
    app.connect("html-collect-pages", pages)
    app.connect("build-finished", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
