"""Finds the Python that the documentation and the docstrings show, and what can be said of it without running it."""

import ast
import builtins
import re
import symtable
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent.parent
_FENCE = re.compile(
    r"^(?P<indent> *)```python(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
# What a snippet says when it loads the demo model.
_MODEL_WORDS = ("emoji-scenes-64", "load_pipeline(")


@dataclass(frozen=True)
class Snippet:
    """One fenced block: where it stands, its code, and whether it is meant to be run."""

    place: str
    code: str
    run: bool

    @property
    def needs_model(self) -> bool:
        return any(word in self.code for word in _MODEL_WORDS)


def pages() -> list[Path]:
    """Every Markdown page that people read, without tests and what the commands write."""
    folders = ("docs", "pipelines", "schedulers", "spaces", "training", "benchmarks")
    built = {ROOT / "docs" / name for name in ("_build", "auto_gallery", "models")}  # by `make docs`
    found = [*sorted(ROOT.glob("*.md")), *(path for name in folders for path in sorted((ROOT / name).rglob("*.md")))]
    return [path for path in found if built.isdisjoint(path.parents)]


def snippets_of(text: str, place: str) -> list[Snippet]:
    """The Python blocks of a Markdown text or a docstring, in order; ```` ```python no-run ```` marks one to read only."""
    found = []
    for match in _FENCE.finditer(text):
        info = match["info"].split()
        if info not in ([], ["no-run"]):
            raise ValueError(f"{place}: ```python{match['info']} is not known; leave it bare or write no-run")
        indent = len(match["indent"])
        code = "\n".join(line[indent:] for line in match["body"].splitlines())
        line = text.count("\n", 0, match.start()) + 1
        found.append(Snippet(f"{place}:{line}", code + "\n", not info))
    return found


def docstring_snippets(file: Path) -> list[Snippet]:
    """The Python blocks in the docstrings of a module."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = getattr(node, "name", "module")
            found += snippets_of(ast.get_docstring(node) or "", f"{file.relative_to(ROOT)}::{name}")
    return found


def unknown_names(code: str, known: Set[str] = frozenset()) -> set[str]:
    """Global names that a piece of code reads and nobody sets: not itself, not `known`, not Python."""
    table = symtable.symtable(code, "<snippet>", "exec")
    read: set[str] = set()
    tables = [table]
    while tables:
        current = tables.pop()
        tables += current.get_children()
        read |= {
            s.get_name() for s in current.get_symbols() if s.is_referenced() and (s.is_global() or current is table)
        }
    return read - defined_names(code) - known - set(dir(builtins))


def defined_names(code: str) -> set[str]:
    """Global names that a piece of code sets."""
    table = symtable.symtable(code, "<snippet>", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def imports_of(code: str) -> str:
    """Only the import statements of a piece of code, wherever they stand."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(ast.unparse(node) for node in nodes)


def broken_links(page: Path) -> list[str]:
    """Relative links and pictures of a page that lead nowhere, and anchors that no heading has."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for match in _LINK.finditer(text):
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or not path.is_relative_to(ROOT):
            broken.append(target)
        elif anchor and path.suffix == ".md" and anchor not in _anchors(path.read_text()):
            broken.append(target)
    return broken


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
