"""What `conf.py` does to texts and pictures: docstrings from Markdown to what Sphinx reads, links to folders outside, pictures of the gallery."""

import re
from pathlib import Path
from typing import Any

from PIL import Image


FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*$")
CODE = re.compile(r"(``?[^`]*``?)")
CONTENTS = """
```{toctree}
:hidden:

which_method
guide_and_rescale
prompt_to_prompt
inversion
samplers
mean_reverting
flowchef
rolling
rolling_motion
stream_batch
batch
editing_benchmark
pie_bench
distillation
models/training
publishing
spaces
own_scheduler
reliability
auto_gallery/index
reference/index
models/index
```
"""
CARD = re.compile(r"\]\((?:\.\./)+(?:pipelines/|schedulers/)?([\w-]+)/README\.md(#[\w-]+)?\)")


def site_links(app: Any, name: str, source: list[str]) -> None:
    """Links to the cards of models and schedulers, and to the page of the training scripts, lead to the copies that the site has, and the
    first page gets a table of contents.

    Both would be out of place in the files themselves, which are read as they are where the code is.
    """
    folder = "" if name.startswith("models/") else "models/"
    source[0] = CARD.sub(lambda found: f"]({folder}{found[1]}.md{found[2] or ''})", source[0])
    if name == "index":
        source[0] += CONTENTS


def copy_cards(app: Any) -> None:
    """Writes the cards of models and schedulers, without their front matter, where `site_links` leads."""
    root = Path(app.srcdir).parent
    folder = Path(app.srcdir) / "models"
    folder.mkdir(exist_ok=True)
    cards = [card for kind in ("pipelines", "schedulers") for card in sorted((root / kind).glob("*/README.md"))]
    for card in cards:
        text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), flags=re.DOTALL)
        for picture in card.parent.glob("*.png"):
            (folder / f"{card.parent.name}-{picture.name}").write_bytes(picture.read_bytes())
        text = re.sub(r"!\[([^\]]*)\]\(([\w-]+\.png)\)", rf"![\1]({card.parent.name}-\2)", text)
        text = text.replace("](../../docs/", "](../")
        (folder / f"{card.parent.name}.md").write_text(text.lstrip(), encoding="utf-8")
    training = (root / "training" / "README.md").read_text(encoding="utf-8")
    (folder / "training.md").write_text(training.replace("](../docs/", "](../"), encoding="utf-8")
    names = "\n".join(card.parent.name for card in cards)
    (folder / "index.md").write_text(f"# Models\n\n```{{toctree}}\n{names}\n```\n", encoding="utf-8")


def reference_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turns fences and indented formulas of a docstring, in place, into blocks of code."""
    found: list[str] = []
    inside = False
    for line in lines:
        fence = FENCE.match(line)
        if fence and not inside:
            found += ["", f"{fence['indent']}.. code-block:: {fence['language'] or 'text'}", ""]
            inside = True
        elif fence:
            found.append("")
            inside = False
        else:
            found.append("    " + line if inside and line.strip() else line if inside else _escaped(line))
    lines[:] = found


def _escaped(line: str) -> str:
    """Bars outside of code are bars, not substitutions."""
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in CODE.split(line))


class PictureScraper:
    """Gives sphinx-gallery what a block of a script leaves in the name `picture`."""

    def __init__(self) -> None:
        self.seen: int | None = None

    def __repr__(self) -> str:
        return "PictureScraper"

    def __call__(self, block: Any, variables: dict[str, Any], settings: dict[str, Any]) -> str:
        from sphinx_gallery.scrapers import figure_rst

        picture = variables["example_globals"].get("picture")
        if not isinstance(picture, Image.Image) or id(picture) == self.seen:
            return ""
        self.seen = id(picture)
        path = next(variables["image_path_iterator"])
        picture.save(path)
        return figure_rst([path], settings["src_dir"])
