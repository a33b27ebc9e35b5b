"""The table equation -> function -> oracle -> law, from the docstrings.

A docstring that says "eq. (8)", "eq. (5), (6)" or "Eq. (13) to (15)" claims these equations of the paper. Who says it decides the column: a function
of `refattn.oracle`, a law in `tests/`, or else a function of the library. What a user calls, `refattn.__all__`, stands for the forms beneath it: they
are listed only where none of it has the equation. Equations of other papers are written without brackets, "eq. 8", beside the year of that paper.

`python docs/extensions/equations.py` writes the table into the README, `make docs` and the tests refuse a README that has another one.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- equations: written by docs/extensions/equations.py -->\n\n", "\n<!-- end of equations -->"

EQUATIONS = {
    1: "a layer, T(x) = f(A(x) + x)",
    2: "softmax attention",
    3: "the same for any similarity",
    4: "similarity φ(q)ᵀφ(k)",
    5: "keys and values summed first",
    6: "(φ(Q) φ(K)ᵀ) V = φ(Q) (φ(K)ᵀ V)",
    7: "φ = elu + 1",
    8: "causal",
    9: "causal, in terms of φ",
    10: "the state S",
    11: "its normaliser Z",
    12: "the quotient of both",
    13: "gradient of φ(Q)",
    14: "of φ(K)",
    15: "of V",
    16: "as an RNN: s₀ = 0",
    17: "z₀ = 0",
    18: "the step of s",
    19: "the step of z",
    20: "the output y",
}

LABEL = re.compile(r"\b[Ee]q\. (\(\d+\)(?:(?:, | and | to )\(\d+\))*)")
OTHER_PAPER = re.compile(r"\b[Ee]qs?\. ?\d")
YEAR = re.compile(r"\b(?:19|20)\d\d\b")
NOT_LISTED = ("adapters", "compiled", "cuda", "simt", "testing")       # the same functions elsewhere


class Docstring(NamedTuple):
    path: Path            # from the root
    line: int
    name: str             # dotted within the file; "" for the file itself
    text: str


def docstrings(root: Path) -> Iterator[Docstring]:
    """All of `refattn` and `tests`, of modules, classes and functions, nested ones too."""
    for path in sorted([*root.glob("refattn/**/*.py"), *root.glob("tests/*.py")]):
        for line, name, text in _docstrings(path.read_text(encoding="utf-8")):
            yield Docstring(path.relative_to(root), line, name, text)


@cache
def _docstrings(source: str) -> list[tuple[int, str, str]]:
    """(line, name, text), for each docstring of a file."""
    found: list[tuple[int, str, str]] = []
    todo: list[tuple[str, ast.AST]] = [("", ast.parse(source))]
    for outer, node in todo:
        text = ast.get_docstring(node) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) else None
        if text:
            found.append((getattr(node, "lineno", 1), outer, " ".join(text.split())))
        todo += [(f"{outer}.{child.name}".lstrip(".") if isinstance(child, (ast.ClassDef, ast.FunctionDef)) else outer, child)
                 for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def labels(text: str) -> list[int]:
    """The numbers of the equations that a docstring claims.

    >>> labels("Eq. (2), (3), as eq. (13) to (15); not eq. 8 of RetNet")
    [2, 3, 13, 14, 15]
    """
    found: list[int] = []
    for words in LABEL.findall(" ".join(text.split())):
        through = False
        for word in re.findall(r"to|\d+", words):
            if word == "to":
                through = True
                continue
            found += range(found[-1] + 1, int(word) + 1) if through else [int(word)]
            through = False
    return found


def face(root: Path) -> dict[str, str]:
    """What `refattn/__init__.py` offers: {"attention.linear_attention": "linear_attention", …}."""
    tree = ast.parse((root / "refattn" / "__init__.py").read_text(encoding="utf-8"))
    return {f"{node.module}.{alias.name}": alias.name for node in tree.body if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names}


def collect(root: Path = ROOT) -> tuple[dict[int, tuple[list[str], list[str], list[str]]], list[str]]:
    """{equation: (functions, oracles, laws)}, and what is wrong, in words."""
    rows: dict[int, tuple[list[str], list[str], list[str]]] = {n: ([], [], []) for n in EQUATIONS}
    beneath: dict[int, list[str]] = {n: [] for n in EQUATIONS}
    public, problems = face(root), []
    for at in docstrings(root):
        where = f"{at.path}:{at.line}: {at.name or 'the module'}"
        module = ".".join(at.path.with_suffix("").parts[1:])
        function = bool(at.name) and "." not in at.name
        if OTHER_PAPER.search(at.text) and not YEAR.search(at.text):
            problems.append(f'{where}: an equation without brackets is one of another paper, but no year of one is named; ours are written "eq. (8)"')
        for n in labels(at.text):
            if n not in EQUATIONS:
                problems.append(f"{where}: eq. ({n}) matches no equation, the paper has (1) to (20)")
            elif at.path.parts[0] == "tests":
                if function and at.name.startswith("test_"):
                    rows[n][2].append(at.name)
                elif function:
                    problems.append(f"{where}: eq. ({n}) is claimed by what is no test")
            elif module == "oracle":
                if function:
                    rows[n][1].append(f"refattn.oracle.{at.name}")
            elif function and at.path.parts[1] not in NOT_LISTED:
                if f"{module}.{at.name}" in public:
                    rows[n][0].append(f"refattn.{public[f'{module}.{at.name}']}")
                elif not at.name.startswith("_"):
                    beneath[n].append(f"refattn.{module}.{at.name}")
    for n, (functions, oracles, laws) in rows.items():
        functions += [] if functions else beneath[n]
        problems += [f"eq. ({n}) has no {what}: no docstring {where} says \"eq. ({n})\"" for names, what, where in (
            (functions, "code", "in refattn/"), (oracles, "oracle", "in refattn/oracle.py"), (laws, "law", "of a test")) if not names]
    return rows, problems


def table(root: Path = ROOT) -> str:
    """The table in Markdown; neighbours that share all columns share a row."""
    lines, groups = ["| equation | function | oracle | law |", "|---|---|---|---|"], []
    for n, columns in collect(root)[0].items():
        columns = tuple(tuple(dict.fromkeys(names)) for names in columns)
        if groups and groups[-1][1] == columns:
            groups[-1][0].append(n)
        else:
            groups.append(([n], columns))
    for numbers, columns in groups:
        said = "; ".join(f"({n}) {EQUATIONS[n]}" for n in numbers)
        lines.append("| " + " | ".join((said, *(", ".join(f"`{name}`" for name in names) for names in columns))) + " |")
    return "\n".join(lines) + "\n"


def problems(root: Path = ROOT) -> list[str]:
    """Everything for which the build fails."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    stands = readme.partition(BEGIN)[2].partition(END)[0]
    return collect(root)[1] + ([] if stands == table(root) else
                               ["README.md has another table of equations than the docstrings: python docs/extensions/equations.py writes it"])


if __name__ == "__main__":
    path = ROOT / "README.md"
    before, found, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    path.write_text(before + found + table() + END + rest.partition(END)[2], encoding="utf-8")
    print("\n".join(problems()) or "README.md: written")
