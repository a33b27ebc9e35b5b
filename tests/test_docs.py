"""Laws of the documents: the table of equations is that of the docstrings, the reference misses nothing, and a page reads the same before and after
the site is built."""
from __future__ import annotations

import ast
import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "extensions"))
equations = importlib.import_module("equations")


# --- equation -> function -> oracle -> law -----------------------------------------------------------------------------------------------

def test_every_equation_of_the_paper_has_code_an_oracle_and_a_law_and_the_readme_says_which():
    assert sorted(equations.EQUATIONS) == list(range(1, 21))
    assert equations.problems() == []


@pytest.mark.parametrize("text, numbers", [
    ("eq. (8)", [8]), ("Eq. (2), (3).", [2, 3]), ("eq. (13) to (15)", [13, 14, 15]), ("by eq. (5) and\n    (6), then eq. (10)", [5, 6, 10]),
    ("eq. (2), (5) to (7) and (9)", [2, 5, 6, 7, 9]), ("RetNet, 2023, eq. 8", []), ("(8) flops", []), ("freq. (8)", [])])
def test_a_label_is_read_as_it_is_meant(text, numbers):
    assert equations.labels(text) == numbers


@pytest.fixture
def copied(tmp_path):
    """What the table is made from, to plant mistakes in."""
    for room in ("refattn", "tests"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"nothing to plant in {path.name}"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("file, old, new, said", [
    ("refattn/causal.py", "(eq. (18) without φ)", "(eq. (21) without φ)", "eq. (21) matches no equation"),
    ("refattn/linear.py", "eq. (5), (6)", "eq. (0), (6)", "eq. (0) matches no equation"),
    ("tests/test_attention.py", '"""Eq. (16) to (19)."""', '"""Eq. (16) to (29)."""', "eq. (29) matches no equation"),
    ("refattn/compiled/vector.py", "Eq. (7).", "Eq. 7.", "no year of one is named"),
    ("refattn/features.py", "eˣ below. Eq. (7) of the paper.", "eˣ below.", "eq. (7) has no code"),
    ("refattn/oracle.py", "Eq. (14), with", "With", "eq. (14) has no oracle"),
    ("tests/test_transformer.py", '"""Eq. (1), and eq. (16) to (20).', '"""', "eq. (20) has no law"),
    ("tests/test_features.py", "Eq. (7), and every other map.", "Every map.", "eq. (7) has no law"),
    ("tests/test_attention_layer.py", '"""Position by position and head', '"""Eq. (2), position by position and head', "what is no test"),
    ("README.md", "`refattn.oracle.eq14`", "`refattn.oracle.eq13`", "README.md has another table"),
    ("README.md", "`test_forward_is_its_definition`", "`test_forward_is_no_definition`", "README.md has another table"),
    ("tests/test_causal.py", "def test_splitting_the_sequence_changes_nothing", "def splitting_the_sequence_changes_nothing", "what is no test")])
def test_a_wrong_label_is_found(copied, file, old, new, said):
    assert equations.problems(copied) == []
    change(copied / file, old, new)
    assert any(said in problem for problem in equations.problems(copied)), equations.problems(copied)


# --- the reference -------------------------------------------------------------------------------------------------------------------------

def public_modules() -> set[str]:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in (ROOT / "refattn").rglob("*.py")}
    return {name for name in names if "._" not in name}


def test_the_reference_has_a_place_for_every_public_module():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    places = re.findall(r"^```\{module\} (\S+)\n```$", "\n".join(pages), flags=re.MULTILINE)
    assert sorted(places) == sorted(public_modules())


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("numpydoc", reason="needs the extra docs")
    return importlib.import_module("reference")


def names_of(arguments: ast.arguments) -> list[str]:
    return [node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg)]


def test_a_module_shows_all_that_is_public_in_it_with_every_parameter(reference):
    for module in public_modules():
        shown = reference.markdown(module)
        described = dict(re.findall(r"^`{6}\{py:(?:function|class)\} (\w+)\((.*)\)$", shown, flags=re.MULTILINE))
        elsewhere = set(re.findall(r"^`refattn\.(\w+)` stands in", shown, flags=re.MULTILINE))
        tree = ast.parse(reference.file_of(module).read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
        assert set(functions) <= set(described) | elsewhere, module
        for name, node in functions.items():
            if name in described:
                arguments = ast.parse(f"def f({described[name]}): pass").body[0].args
                assert names_of(arguments) == names_of(node.args), f"{module}.{name}"
                assert not any(isinstance(part, ast.arg) and part.annotation for part in ast.walk(arguments)), f"{module}.{name}"
    shown = reference.markdown("refattn")
    import refattn
    assert set(refattn.__all__) == set(re.findall(r"^`{6}\{py:\w+\} (\w+)\(", shown, flags=re.MULTILINE))


def test_a_docstring_becomes_markdown_with_its_sections_doctests_and_bars(reference):
    shown = reference.body('''
        What it does, |x| wide.

        | name | kernel |
        |---|---|
        | a | exp(-|q - k| / 2) |

        Parameters
        ----------
        q, k : (..., *, D)
            Rows.

        Raises
        ------
        ValueError
            "q: expected".

        >>> 1 + 1
        2
        ''')
    assert shown == "\n".join((
        "What it does, |x| wide.", "", "| name | kernel |", "|---|---|", r"| a | exp(-\|q - k\| / 2) |", "", "**Parameters**", "",
        r"- **q, k** : (..., \*, D)" + "\\", "  Rows.", "", "**Raises**", "", "- ValueError\\", '  "q: expected".', "", "**Examples**", "", "",
        "```pycon", ">>> 1 + 1", "2", "```"))


# --- what is done to a page before it is read ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("sphinx", reason="needs the extra docs")
    pytest.importorskip("numpydoc", reason="needs the extra docs")
    return importlib.import_module("pages")


@pytest.mark.parametrize("link, becomes", [
    ("[a](../notation.md#numbers)", "[a](../notation.md#numbers)"),                                    # of the site
    ("[a](../../README.md#install)", "[a](../readme.md#install)"),                                     # included in it
    ("[a](../../refattn/linear.py)", "[a](source:refattn/linear.py)"), ("[a](../../refattn/cuda)", "[a](source:refattn/cuda)"),
    ("[a](https://example.org/x.md)", "[a](https://example.org/x.md)"), ("[a](#b)", "[a](#b)"), ("x[0](y)", "x[0](y)"),
    ("```python\n[a](../../README.md)\n```", "```python\n[a](../../README.md)\n```")])
def test_a_link_leads_to_the_same_on_the_site(pages, link, becomes):
    here = ROOT / "docs" / "derivations"
    assert pages.relink(link, here, here) == becomes


def test_links_of_the_readme_are_read_from_where_it_lies(pages):
    assert pages.relink("[a](docs/cuda.md) [b](LICENSE)", ROOT, ROOT / "docs") == "[a](cuda.md) [b](source:LICENSE)"


def test_the_readme_is_read_where_a_page_includes_it_with_its_links_as_they_are_meant(pages):
    source = ["```{include} ../README.md\n```\n"]
    pages.read(None, "readme", source)
    assert source[0].startswith(pages.NOTEBOOK) and "# refattn" in source[0]
    assert "[linear](derivations/linear.md)" in source[0] and "[LICENSE](source:LICENSE)" in source[0] and "](docs/" not in source[0]


def test_python_blocks_become_cells_beside_the_files_that_the_page_shows(pages):
    text = "In a file `x.cu`:\n\n```cpp\nint y;\n```\n\n```python\nprint(1)\n```\n\n```py\nleft\n```\n"
    made = pages.cells(text)
    assert made.startswith(pages.NOTEBOOK) and made.count("```{code-cell}") == 2
    assert made.index("open('x.cu', 'w').write('int y;\\n')") < made.index("```{code-cell} python\nprint(1)")
    assert "```py\nleft" in made and "```cpp\nint y;" in made
    assert pages.cells("no code") == "no code"
