"""Contact sheets: rows of pictures with captions under them, drawn with Pillow alone."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


PAPER = (250, 250, 248)
INK = (34, 36, 40)
FAINT = (120, 124, 130)
FRAME = (222, 222, 218)
ACCENT = (193, 59, 26)

MARGIN = 28
GAP = 14
TITLE_SIZE = 26
TEXT_SIZE = 14
LINE = 18


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Args:
        image (`PIL.Image.Image`): The picture, of any size; it is scaled to the tile.
        caption (`str`, *optional*): The words under it, broken into lines as needed.
        compare (`str`, *optional*): A sentence whose words are drawn as usual; words of `caption` that it does not
            have are drawn in the accent colour.
    """

    image: Image.Image
    caption: str = ""
    compare: str | None = None


def contact_sheet(
    rows: Sequence[Sequence[Tile]],
    *,
    title: str = "",
    subtitle: str = "",
    columns: Sequence[str] = (),
    notes: Sequence[str] = (),
    tile: int = 192,
) -> Image.Image:
    """Lays pictures out as a sheet.

    Args:
        rows (`Sequence[Sequence[Tile]]`):
            The tiles, row by row; rows may differ in length. At least one tile.
        title (`str`, *optional*):
            Headline; it and the other texts take no space when empty.
        subtitle (`str`, *optional*):
            One or more lines under the headline, separated by newlines and broken where they are too long.
        columns (`Sequence[str]`, *optional*):
            A heading for each column.
        notes (`Sequence[str]`, *optional*):
            A line under each row, such as its cost.
        tile (`int`, *optional*, defaults to 192):
            Side of a tile in pixels, at least 16.

    Returns:
        `PIL.Image.Image`: The sheet in RGB.

    Raises:
        ValueError: If there is no tile, `tile` is too small, or there are more headings than columns or notes than rows.

    Example:
        ```python
        from PIL import Image
        from diffusers_ext.sheets import Tile, contact_sheet

        red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
        sheet = contact_sheet([[Tile(red, "a red wall"), Tile(blue, "a blue wall", compare="a red wall")]])
        ```
    """
    width = max((len(row) for row in rows), default=0)
    if not width:
        raise ValueError("rows holds no tile; give at least one")
    if tile < 16:
        raise ValueError(f"tile={tile} is too small to see; use at least 16 pixels")
    if len(columns) > width or len(notes) > len(rows):
        raise ValueError(
            f"{len(columns)} headings and {len(notes)} notes do not fit {width} columns and {len(rows)} rows"
        )
    body, head = ImageFont.load_default(size=TEXT_SIZE), ImageFont.load_default(size=TITLE_SIZE)
    inner = width * tile + (width - 1) * GAP
    title_lines = _wrap(title, head, inner)
    subtitle_lines = [line for part in subtitle.splitlines() for line in _wrap(part, body, inner)]
    captions = [[_wrap(item.caption, body, tile) for item in row] for row in rows]
    note_lines = [_wrap(notes[i] if i < len(notes) else "", body, inner) for i in range(len(rows))]

    title_line = TITLE_SIZE + 8
    top = MARGIN + len(title_lines) * title_line + len(subtitle_lines) * LINE
    top += GAP if title_lines or subtitle_lines else 0
    heading = LINE + 4 if columns else 0
    heights = [
        tile + 6 + LINE * max((len(lines) for lines in texts), default=0) + LINE * len(extra)
        for texts, extra in zip(captions, note_lines, strict=True)
    ]
    height = top + heading + sum(heights) + GAP * (len(rows) - 1) + MARGIN
    sheet = Image.new("RGB", (inner + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(sheet)

    y = MARGIN
    for line in title_lines:
        draw.text((MARGIN, y), line, font=head, fill=INK)
        y += title_line
    for line in subtitle_lines:
        draw.text((MARGIN, y), line, font=body, fill=FAINT)
        y += LINE
    for i, name in enumerate(columns):
        draw.text((MARGIN + i * (tile + GAP), top), name, font=body, fill=FAINT)
    y = top + heading
    for row, texts, extra, used in zip(rows, captions, note_lines, heights, strict=True):
        for i, (item, lines) in enumerate(zip(row, texts, strict=True)):
            x = MARGIN + i * (tile + GAP)
            sheet.paste(item.image.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
            draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline=FRAME)
            _draw_caption(draw, (x, y + tile + 6), lines, body, changed_words(item.caption, item.compare))
        for i, line in enumerate(extra):
            draw.text((MARGIN, y + used - LINE * (len(extra) - i)), line, font=body, fill=FAINT)
        y += used + GAP
    return sheet


def changed_words(caption: str, compare: str | None) -> list[bool]:
    """For each word of a caption, whether it is new or other than in the sentence it is compared with.

    Args:
        caption (`str`): The words to judge.
        compare (`str`, *optional*): The sentence to compare with; without it nothing has changed.

    Returns:
        `list[bool]`: One entry a word.
    """
    words = caption.split()
    if compare is None:
        return [False] * len(words)
    changed = [True] * len(words)
    matcher = difflib.SequenceMatcher(a=compare.split(), b=words, autojunk=False)
    for block in matcher.get_matching_blocks():
        changed[block.b : block.b + block.size] = [False] * block.size
    return changed


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _draw_caption(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    changed: Sequence[bool],
) -> None:
    marks = iter(changed)
    space = font.getlength(" ")
    y = float(corner[1])
    for line in lines:
        x = float(corner[0])
        for word in line.split():
            draw.text((x, y), word, font=font, fill=ACCENT if next(marks) else INK)
            x += font.getlength(word) + space
        y += LINE
