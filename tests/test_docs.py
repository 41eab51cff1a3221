# SPDX-License-Identifier: Apache-2.0
"""The documentation: every block of Python is run, every command of ours is one that there is, and the site builds."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from fpn_fast import __main__ as command_line
from fpn_fast import nn, ops
from fpn_fast.bench import command as bench_command
from fpn_fast.verify import command as verify_command

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:fpn-fast|python -m fpn_fast) +([a-z].*)")


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every block of code."""
    return BLOCK.findall(path.read_text())


# tests/test_deploy.py runs the page that compiles a detector.
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "```python" in page.read_text() and page.stem != "deploy"],
    ids=lambda page: page.stem,
)
def test_python_blocks_run(page, monkeypatch, tmp_path):
    """All of a page in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    # Where the plugin is installed pytest knows it; a marker that it does not know would be an error here.
    monkeypatch.setattr(pytest.mark, "_config", None)
    scope = {"__name__": "__main__"}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), scope)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.stem)
def test_commands_are_ones_that_there_are(path, monkeypatch, tmp_path):
    """The arguments of ours are parsed, whatever a command would do; a make target is in the Makefile."""
    parsed = []
    run = lambda options: parsed.append(options) or 0  # noqa: E731
    monkeypatch.setattr(verify_command, "verify", run)
    monkeypatch.setattr(bench_command, "bench", run)
    monkeypatch.setattr(command_line, "_info", run)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    count = 0
    for language, text in blocks(path):
        if language == "python":
            continue
        for line in text.splitlines():
            if found := COMMAND.search(line):
                assert command_line.main(shlex.split(found.group(1), comments=True)) == 0
                count += 1
            if found := re.match(r"make ([a-z-]+)", line):
                assert found.group(1) in targets
    assert len(parsed) == count


def test_every_block_has_a_language_that_a_test_knows():
    for path in PAGES:
        assert {language for language, _ in blocks(path)} <= {"python", "sh", "json", "yaml", "cpp"}, path


def public_docstrings():
    """(name, text) of every docstring that documents a module, class or function without an underscore."""
    for path in sorted((ROOT / "fpn_fast").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = getattr(node, "name", path.stem)
                if not name.startswith("_") or name == "__init__":
                    yield f"{path.relative_to(ROOT)}: {name}", ast.get_docstring(node) or ""


def test_words_that_a_reader_would_have_to_translate_stay_out():
    words = "host wait|waits for (the|a) GPU|without a wait|few numbers|in no form|as its library does"
    words = re.compile(words.replace(" ", r"\s+"), re.IGNORECASE)
    texts = [(path.name, path.read_text()) for path in (*PAGES, *(ROOT / "docs" / "img").iterdir(), *ROOT.glob("*.md"))]
    texts += public_docstrings()
    assert len(texts) > 300
    assert words.search("It never waits\nfor a GPU.")
    assert [(name, found.group()) for name, text in texts for found in words.finditer(text)] == []


def test_the_readme_fits_on_three_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_drawings_are_there_and_well_formed():
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("kernels.md", "family.md"))
    used = re.findall(r"\]\(img/([\w-]+\.svg)\)", pages)
    used += ["speedup.svg", "step-budget.svg"]
    assert sorted(used) == sorted(path.name for path in (ROOT / "docs" / "img").iterdir())
    for name in used:
        assert ET.parse(ROOT / "docs" / "img" / name).getroot().get("viewBox")


def test_the_site_builds_strictly(tmp_path):
    for name in ("material", "mkdocstrings"):
        assert importlib.util.find_spec(name), f"{name} is in requirements-dev.txt"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "api.html").read_text()
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for name in listed:
        assert f'id="{name}"' in api, name
    # Every op and every module of ours is among them.
    own = [getattr(ops, name) for name in ops.__all__] + [getattr(nn, name) for name in nn.__all__]
    own = [each for each in own if getattr(each, "__module__", "").startswith("fpn_fast.")]
    assert {f"{each.__module__}.{each.__name__}" for each in own} <= set(listed)
    assert "Specification" in (tmp_path / "new-op.html").read_text()
    assert {page.with_suffix(".html").name for page in PAGES} <= {path.name for path in tmp_path.iterdir()}
    # Nothing that a reader's browser would fetch from elsewhere.
    for page in tmp_path.glob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!localhost)[^"]*"', page.read_text())
