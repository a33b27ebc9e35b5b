"""The reference: what a module says of itself and of all that is public in it, as Markdown, in the order of the file.

Read from the source, not imported, so no extra need be installed. Docstrings of this library are Markdown with the sections of numpydoc.
"""
from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from numpydoc.docscrape import NumpyDocString

ROOT = Path(__file__).resolve().parents[2]
HEADINGS = ("Parameters", "Returns", "Raises", "Notes", "Examples")
Definition = ast.FunctionDef | ast.ClassDef


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules() -> list[str]:
    """Every public module."""
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sorted(ROOT.glob("refattn/**/*.py")))
    return [name for name in names if not any(part.startswith("_") for part in name.split("."))]


def public(module: str) -> list[Definition]:
    """The functions and classes that a module defines, but for private ones."""
    body = ast.parse(file_of(module).read_text(encoding="utf-8")).body
    return [node for node in body if isinstance(node, Definition) and not node.name.startswith("_")]


def borrowed(module: str) -> dict[str, str]:
    """What the package offers that stands in its modules: {name: module}. `refattn.testing.check_kernel` is imported where it is first asked for."""
    path = file_of(module)
    if path.name != "__init__.py":
        return {}
    imports = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {alias.name: f"{module}.{node.module}" for node in imports if node.module
            for alias in node.names if not alias.name.startswith("_") and alias.name != "main"}


def homes() -> dict[str, str]:
    """Full name where it is defined -> name under which it is described: that of `refattn` itself, for what that offers."""
    return {f"{home}.{name}": f"refattn.{name}" for name, home in borrowed("refattn").items()}


@cache
def names() -> dict[str, str]:
    """What text calls them -> name under which they are described: `refattn.causal.causal_step`, `causal.causal_step`, and where no other has it and
    it cannot be a mere word, `causal_step`; also `refattn.causal`."""
    found: dict[str, set[str]] = {}
    for module in modules():
        here = {node.name: f"{module}.{node.name}" for node in public(module)} | {name: f"{home}.{name}" for name, home in borrowed(module).items()}
        for name, full in here.items():
            described = homes().get(full, full)
            word = "_" not in name or module == "refattn.oracle"
            for said in {f"{module}.{name}", f"{module}.{name}".removeprefix("refattn."), full if word else name}:
                found.setdefault(said, set()).add(described)
        found[module] = {module}
    face = {f"refattn.{name}" for name in borrowed("refattn")}
    one = {said: sorted(full & face or full) for said, full in found.items()}
    return {said: full[0] for said, full in one.items() if len(full) == 1}


def markdown(module: str) -> str:
    """The docstring of the module, then all that is public in it."""
    text = file_of(module).read_text(encoding="utf-8")
    lines = [f"```{{py:module}} {module}\n```", "", link(module, 1), "", body(ast.get_docstring(ast.parse(text)) or ""), ""]
    for name, home in borrowed(module).items():
        if module == "refattn":
            node = next(node for node in public(home) if node.name == name)
            lines += described(node, home, f"refattn.{name}")
        else:
            lines += [f"- `{home}.{name}`"]
    for node in public(module):
        full = f"{module}.{node.name}"
        lines += ["", f"`{homes()[full]}` stands in [the public functions](face.md)."] if full in homes() else described(node, module, full)
    return "\n".join(lines)


def described(node: Definition, module: str, full: str) -> list[str]:
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    inner = [link(module, node.lineno), "", *body(ast.get_docstring(node) or "").splitlines()]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
                inner += ["", f"**`{method.name}{signature(method)}`**", "", *body(ast.get_docstring(method) or "").splitlines()]
    return ["", f"``````{{py:{kind}}} {full.rpartition('.')[2]}{signature(node)}", "", *inner, "``````"]


def signature(node: Definition) -> str:
    """Names and defaults; types and shapes are told below it."""
    if isinstance(node, ast.ClassDef):
        fields = [f.target.id + ("" if f.value is None else f"={ast.unparse(f.value)}") for f in node.body
                  if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
        return f"({', '.join(fields)})"
    arguments = ast.parse(ast.unparse(node.args).join(("def f(", "): pass"))).body[0].args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    return f"({ast.unparse(arguments)})".replace("(self, ", "(").replace("(self)", "()")


def link(module: str, line: int) -> str:
    path = file_of(module).relative_to(ROOT).as_posix()
    return f"[source](source:{path}#L{line})"


def body(docstring: str) -> str:
    """A docstring as Markdown: sections get headings, parameters become items, doctests code."""
    docstring = inspect.cleandoc(docstring)
    if "Examples\n---" not in docstring:
        docstring = re.sub(r"\n\n(?=>>> )", "\n\nExamples\n--------\n", docstring, count=1)
    start = re.search(rf"^(?:{'|'.join(HEADINGS)})\n-{{3,}}$", docstring, re.MULTILINE)
    if start is None:
        return prose(docstring)
    parts = [prose(docstring[:start.start()].rstrip())]
    sections = NumpyDocString(docstring[start.start():])
    for heading in HEADINGS:
        content = sections[heading]
        if not content:
            continue
        parts += [f"**{heading}**"]
        if isinstance(content[0], str):
            parts += [prose(inspect.cleandoc("\n".join(content)))]
        else:
            parts += ["\n".join(item(*parameter) for parameter in content)]
    return "\n\n".join(parts)


def item(name: str, kind: str, description: list[str]) -> str:
    name, kind = (f"**{name}**" if name else "", kind.replace("*", r"\*"))
    indented = prose("\n".join(description)).replace("\n", "\n  ")
    return f"- {name}{' : ' if name and kind else ''}{kind}" + (f"\\\n  {indented}" if description else "")


def prose(text: str) -> str:
    """Doctests and aligned lines as code, and bars inside the cells of a table as bars."""
    paragraphs = re.split(r"\n{2,}", text)
    text = "\n\n".join(re.sub("^", "    ", p, flags=re.MULTILINE) if re.fullmatch(r"(\w+ {2,}\S.*\n?)+", p) else p for p in paragraphs)
    return "\n".join(_prose(text.splitlines()))


def _prose(lines: list[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        if not inside and line.lstrip().startswith(">>> "):
            inside = True
            yield f"\n{indent}```pycon"
        elif inside and not line.strip():
            inside = False
            yield "```"
        if re.match(r"\|.*\|$", line) and not re.match(r"\|[-|: ]+\|$", line):
            line = "|" + re.sub(r"(?<=[^\s\\])\||\|(?=\S)", r"\\|", line[1:-1]) + "|"
        yield line
    if inside:
        yield "```"
