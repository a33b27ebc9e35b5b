"""What is done to a page's Markdown before it is read, so that the same files read well as they are.

- Python blocks become cells, executed in order, in one namespace, as the tests execute them. Pages in `embed/` show other frameworks, which need not
  be installed here: their blocks are shown as they are. Files that a page shows ("In a file `rows.cu`:") lie beside the cells.
- `{include}` of a file of the repository takes it in, its links read from where it lies.
- Links to files of the repository lead to their sources, those to the README, CONTRIBUTING and CHANGELOG to the pages that include them.
- `{equations}` is the table of `equations.py`; `{module}` what `reference.py` says of a module.
"""
from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import equations
import reference
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INCLUDED = {ROOT / "README.md": "readme.md", ROOT / "CONTRIBUTING.md": "contributing.md", ROOT / "CHANGELOG.md": "changelog.md"}
NOTEBOOK = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n"
logger = logging.getLogger(__name__)


def relink(text: str, here: Path, page: Path) -> str:
    """`text` lies in the folder `here`, and its links are to work on a page in the folder `page`; outside of code."""
    def target(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        file = (here / path).resolve()
        anchor = anchor and f"#{anchor}"
        if file in INCLUDED:
            return f"]({os.path.relpath(DOCS / INCLUDED[file], page)}{anchor})"
        if not file.exists() or not file.is_relative_to(ROOT):
            return match[0]
        if file.is_relative_to(DOCS) and not file.is_relative_to(DOCS / "interactive"):
            return f"]({os.path.relpath(file, page)}{anchor})"
        return f"](source:{file.relative_to(ROOT).as_posix()}{anchor})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", target, part) for part in parts)


def cells(text: str) -> str:
    """Python blocks as cells, where the page needs nothing that is not here."""
    if "```python\n" not in text and "```{code-cell}" not in text:
        return text
    if "simt.build(" in text and shutil.which("g++") is None:
        logger.info("a page is not executed: the emulator needs g++")
        return text
    text = re.sub(r"^```python$", "```{code-cell} python", text, flags=re.MULTILINE)
    shown = re.findall(r"[Ii]n a file `([\w.]+)`:\n\n```cpp\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    files = "".join(f"```{{code-cell}} python\n:tags: [remove-cell]\n\nopen({name!r}, 'w').write({content!r})\n```\n\n" for name, content in shown)
    text = text.replace("```{code-cell}", files + "```{code-cell}", 1)
    return text if text.startswith("---\n") else NOTEBOOK + text


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    page = (DOCS / docname).parent

    def include(match: re.Match[str]) -> str:
        file = (page / match[1]).resolve()
        return relink(file.read_text(encoding="utf-8"), file.parent, page)

    text = relink(source[0], page, page)
    if docname == "index":                                         # chapters that are not written yet are no reason to warn
        text = re.sub(r"^(\S+\*)\n", lambda match: match[0] if any(DOCS.glob(f"{match[1]}.md")) else "", text, flags=re.MULTILINE)
    text = re.sub(r"^```\{include\} (\S+)\n```$", include, text, flags=re.MULTILINE)
    text = re.sub(r"^```\{equations\}\n```$", lambda match: equations.table(), text, flags=re.MULTILINE)
    text = re.sub(r"^```\{module\} (\S+)\n```$", lambda match: reference.markdown(match[1]), text, flags=re.MULTILINE)
    source[0] = text if docname.startswith("embed/") else cells(text)


def check(app: Sphinx) -> None:
    for problem in equations.problems():
        logger.warning(problem)
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    described = re.findall(r"^```\{module\} (\S+)$", pages, flags=re.MULTILINE)
    for name in {*reference.modules()} ^ {*described}:
        logger.warning("docs/reference: %s is no public module, or has no place there", name)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", check)
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
