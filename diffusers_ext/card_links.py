"""Links of a model card: which lead out of its folder, where the Hub has nothing, and where they could lead instead."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path


# a block of code, which is left alone, or a link or picture of Markdown
_PIECES = re.compile(r"```.*?```|(!?)\[([^\]]*)\]\(([^)\s]+)\)", re.DOTALL)


def local_links(text: str) -> Iterator[tuple[bool, str]]:
    """Whether it is a picture, and the path without its anchor, of each link of Markdown that is no address and no anchor alone.

    Example:
        >>> list(local_links("![p](a.png) [q](../b.md#c) [r](https://d.e) [s](#f)"))
        [(True, 'a.png'), (False, '../b.md')]
    """
    for match in _PIECES.finditer(text):
        path = (match[3] or "").partition("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            yield bool(match[1]), path


def with_source_links(text: str, folder: Path, files: Collection[str], source_url: str) -> str:
    """A card whose links out of its folder lead to the project that the folder is from.

    Args:
        text (`str`): The card.
        folder (`pathlib.Path`): Its folder, inside a git checkout.
        files (`Collection[str]`): What the folder holds; links to these stay.
        source_url (`str`): Address of the project's files, such as `https://github.com/me/project/blob/main`.

    Returns:
        `str`: The card.

    Raises:
        ValueError: If `source_url` is no address, or the folder is in no git checkout or a link leads out of that.
    """
    if not re.match(r"https?://[^/\s]+/\S", source_url):
        raise ValueError(
            f"source_url={source_url!r} is no address; give one like https://github.com/me/project/blob/main"
        )
    folder = folder.resolve()
    root = next((parent for parent in folder.parents if (parent / ".git").exists()), None)
    if root is None:
        raise ValueError(f"source_url needs a folder inside a git checkout, which {folder} is not; leave it out")

    def replaced(match: re.Match[str]) -> str:
        path, mark, anchor = (match[3] or "").partition("#")
        if not path or match[1] or path in files or re.match(r"[a-z]+:", path):
            return match[0]
        target = (folder / path).resolve()
        if not target.is_relative_to(root):
            raise ValueError(f"the link {path} leads out of {root}; mend it before source_url can replace it")
        return f"[{match[2]}]({source_url.rstrip('/')}/{target.relative_to(root).as_posix()}{mark}{anchor})"

    return _PIECES.sub(replaced, text)
