"""Every piece of Python in the documentation runs, or at least means something; every link leads somewhere."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest

import diffusers_ext
from tests.docs.snippets import (
    ROOT,
    Snippet,
    broken_links,
    defined_names,
    docstring_snippets,
    imports_of,
    pages,
    snippets_of,
    unknown_names,
)


MODEL_IS_HERE = (ROOT / "pipelines" / "emoji-scenes-64" / "model_index.json").is_file()
PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
PAGE_SNIPPETS = {name: snippets_of(page.read_text(), name) for name, page in PAGES.items()}
LIBRARY = sorted((ROOT / "diffusers_ext").rglob("*.py"))
DOCSTRING_SNIPPETS = [snippet for file in LIBRARY for snippet in docstring_snippets(file)]


@pytest.fixture(scope="module")
def copy_of_the_checkout(tmp_path_factory) -> Path:
    """What examples read, in a place where they may also write: no example can harm the checkout itself."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "pipelines", "schedulers"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture
def in_the_copy(copy_of_the_checkout, monkeypatch) -> Iterator[None]:
    """Runs a test in the copy."""
    monkeypatch.chdir(copy_of_the_checkout)
    yield
    # Some examples show `register()`, whose effect must not reach other tests.
    for name in diffusers_ext.__all__:
        if name.endswith("Pipeline"):
            vars(diffusers).pop(name, None)


def check(snippets: list[Snippet]) -> None:
    """Compiles the snippets of one page, resolves their imports and their names, each seeing those before it."""
    known: set[str] = set()
    for snippet in snippets:
        compile(snippet.code, snippet.place, "exec")
        exec(compile(imports_of(snippet.code), snippet.place, "exec"), {})
        assert not unknown_names(snippet.code, known), snippet.place
        known |= defined_names(snippet.code)


@pytest.mark.parametrize("name", [name for name, snippets in PAGE_SNIPPETS.items() if snippets])
def test_the_python_of_a_page_runs_from_top_to_bottom(name, in_the_copy):
    snippets = PAGE_SNIPPETS[name]
    check(snippets)
    if any(snippet.needs_model and snippet.run for snippet in snippets) and not MODEL_IS_HERE:
        pytest.skip("needs the demo model; checked without running")
    namespace: dict[str, object] = {"__name__": "snippet"}
    for snippet in snippets:
        if snippet.run:
            exec(compile(snippet.code, snippet.place, "exec"), namespace)


@pytest.mark.parametrize("snippet", DOCSTRING_SNIPPETS, ids=lambda snippet: snippet.place)
def test_the_example_of_a_docstring_runs(snippet, in_the_copy):
    check([snippet])
    if snippet.needs_model and not MODEL_IS_HERE:
        pytest.skip("needs the demo model; checked without running")
    if snippet.run:
        exec(compile(snippet.code, snippet.place, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("name", PAGES)
def test_no_link_of_a_page_leads_nowhere(name):
    assert not broken_links(PAGES[name])


def test_pages_name_no_folder_of_one_machine():
    for name, page in PAGES.items():
        text = page.read_text()
        assert not [word for word in ("/root/", "/home/", str(Path.home()) + "/") if word in text], name


def test_the_checker_itself_sees_what_is_wrong(tmp_path, monkeypatch):
    (good, bad) = snippets_of("```python\nx = 1\n```\n\n  ```python no-run\n  print(x, y)\n  ```\n", "page")
    assert good.run and not bad.run
    assert unknown_names(bad.code) == {"x", "y"} and unknown_names(bad.code, {"x"}) == {"y"}
    assert unknown_names("def f(a):\n    return a + len(b)\n") == {"b"}
    assert imports_of("if True:\n    from os import path\n") == "from os import path"
    with pytest.raises(ValueError, match="hidden"):
        snippets_of("```python hidden\n```\n", "page")
    monkeypatch.setattr("tests.docs.snippets.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(
        "# A head\n[a](page.md#a-head) [b](#none) [c](gone.md) [d](https://example.org)\n"
    )
    assert broken_links(tmp_path / "page.md") == ["#none", "gone.md"]
