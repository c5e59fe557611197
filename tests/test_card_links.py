"""Links of model cards that lead out of the folder."""

from pathlib import Path

import pytest

from diffusers_ext.card_links import local_links, with_source_links


URL = "https://example.org/me/project/blob/main"
CARD = """# A card

![picture](samples.png) [here](notes.md), [sibling](../other/README.md#how), [page](../../docs/page.md),
[web](https://example.org/a.md), [mail](mailto:a@example.org), [below](#below), ![outside](../picture.png)

```python
x = table[name](../../docs/page.md)
```
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / ".git").mkdir()
    folder = tmp_path / "pipelines" / "mine"
    folder.mkdir(parents=True)
    return folder


def test_addresses_anchors_and_code_are_no_local_links():
    found = [
        (True, "samples.png"), (False, "notes.md"), (False, "../other/README.md"), (False, "../../docs/page.md"),
        (True, "../picture.png"),
    ]  # fmt: skip
    assert list(local_links(CARD)) == found


def test_only_links_out_of_the_folder_are_replaced(folder: Path):
    changed = with_source_links(CARD, folder, {"samples.png", "notes.md"}, URL + "/")
    expected = CARD.replace("(../other/README.md#how)", f"({URL}/pipelines/other/README.md#how)")
    expected = expected.replace("[page](../../docs/page.md)", f"[page]({URL}/docs/page.md)")
    assert changed == expected


def test_a_card_without_such_links_stays_as_it_is(folder: Path):
    text = "[here](notes.md) and [there](https://example.org)"
    assert with_source_links(text, folder, {"notes.md"}, URL) == text


def test_what_cannot_be_replaced_is_said(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    with pytest.raises(ValueError, match="source_url='github' is no address; give one like https://"):
        with_source_links(CARD, folder, set(), "github")
    with pytest.raises(ValueError, match=r"the link ../../../secret.md leads out of .*; mend it"):
        with_source_links("[a](../../../secret.md)", folder, set(), URL)
    (folder.parents[1] / ".git").rmdir()
    with pytest.raises(ValueError, match="source_url needs a folder inside a git checkout, which .*mine is not"):
        with_source_links(CARD, folder, set(), URL)
