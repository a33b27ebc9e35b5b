"""Laws of the command line: it explains itself, imports a program only when asked for it, and its exit code says how it went."""
from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from refattn import __main__
from refattn.__main__ import main


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    script = f"import sys; {before}; from refattn.__main__ import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


def stand_in(monkeypatch: pytest.MonkeyPatch, command: str, program: object) -> None:
    module = types.ModuleType(f"refattn.{command}")
    module.main = program                                           # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"refattn.{command}", module)


@pytest.mark.parametrize("command", sorted(__main__.COMMANDS))
def test_a_command_gets_its_arguments_untouched_and_its_code_is_ours(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    given: list[list[str]] = []
    stand_in(monkeypatch, command, lambda argv: given.append(list(argv)) or 7)
    for arguments in ([], ["--help"], ["--out", "x", "-v"], ["--seed=3", "bench"]):
        assert main([command, *arguments]) == 7
        assert given.pop() == arguments


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m refattn") and all(command in text for command in __main__.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--nonsense"], ["--seed", "3"]])
def test_what_is_not_understood_ends_with_usage_and_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m refattn")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("refattn ")


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    names = "demo bench checkpoint transformer".split()
    script = f"import sys, refattn.__main__; sys.exit(any('refattn.' + n in sys.modules for n in {names}) or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_missing_extra_is_said_without_a_traceback(tmp_path: Path) -> None:
    done = run("demo", "--smoke", "--out", str(tmp_path / "out"), before="sys.modules['sklearn'] = None")
    assert done.returncode == 1
    assert done.stderr == "this needs scikit-learn, which is not installed; install it with: pip install 'refattn[demo]'\n"
    assert done.stdout == ""


def test_a_broken_import_is_a_defect_and_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        from refattn.oracle import nothing_of_that_name             # type: ignore[attr-defined]
        return int(nothing_of_that_name)

    stand_in(monkeypatch, "demo", broken)
    with pytest.raises(ImportError, match="nothing_of_that_name"):
        main(["demo"])


def test_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "refattn", "demo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m refattn demo") and "--minutes" in done.stdout
