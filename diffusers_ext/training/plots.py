"""Lines over time, drawn with pillow: no plotting library is needed."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont


MARGIN, LABEL = 12, 22
# Drawn larger and then made smaller, because pillow's lines have hard edges.
FINER = 2


def line_panels(
    titles: Sequence[str], lines: Sequence[tuple[str, str, torch.Tensor]], width: int = 900, height: int = 90
) -> Image.Image:
    """A panel a channel, one above the other, with a line for each sequence; those named first are drawn below the others.

    Args:
        titles (`Sequence[str]`): One a channel.
        lines (`Sequence[tuple[str, str, torch.Tensor]]`): Name, colour and sequence `(frames, channels)` of each. The first tells how
            long the axis of time is.
        width (`int`, *optional*, defaults to 900): Of the picture, in pixels.
        height (`int`, *optional*, defaults to 90): Of a panel, in pixels.

    Returns:
        `PIL.Image.Image`: RGB.

    Example:
        ```python
        import torch
        from diffusers_ext.training.plots import line_panels

        wave = torch.sin(torch.linspace(0, 6, 50))[:, None]
        assert line_panels(["x"], [("sine", "#c0392b", wave)], width=300, height=80).size == (300, 146)
        ```
    """
    bottom = LABEL + len(titles) * (height + LABEL)
    picture = Image.new("RGB", (FINER * width, FINER * (bottom + LABEL)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12 * FINER)

    def scaled(*numbers: float) -> tuple[float, ...]:
        return tuple(FINER * number for number in numbers)

    across = width - 2 * MARGIN
    step = across / max(1, len(lines[0][2]) - 1)
    for channel, title in enumerate(titles):
        top = LABEL + channel * (height + LABEL)
        values = torch.cat([line[:, channel] for _, _, line in lines]).double()
        low, spread = float(values.min()), float(values.max() - values.min()) or 1.0
        draw.rectangle(scaled(MARGIN, top, MARGIN + across, top + height), outline="#dddddd", width=FINER)
        draw.text((FINER * MARGIN, FINER * (top - 4)), title, fill="black", font=font, anchor="ls")
        for _, colour, line in lines:
            points: list[float] = []
            for place, value in enumerate(line[:, channel].tolist()):
                points += scaled(MARGIN + step * place, top + height * (1.0 - (value - low) / spread))
            draw.line(points, fill=colour, width=3, joint="curve")
    for place, (name, colour, _) in enumerate(lines):
        x, y = MARGIN + place * across / len(lines), bottom + LABEL / 2 - 4
        draw.line(scaled(x, y, x + 22, y), fill=colour, width=3 * FINER)
        draw.text((FINER * (x + 28), FINER * y), name, fill="black", font=font, anchor="lm")
    return picture.resize((width, bottom + LABEL), Image.Resampling.LANCZOS)
