r"""Rewards: numbers that say how good a picture is, higher is better; what P-GRAFT (`pgraft.py`) keeps samples by.

    brightness     mean of Y = .299 R + .587 G + .114 B (ITU-R BT.601)
    colourfulness  sqrt(s_rg^2 + s_yb^2) + .3 sqrt(m_rg^2 + m_yb^2), rg = R - G, yb = (R + G) / 2 - B on 0 ... 255,
                   s deviations and m means over the picture (Hasler & Suesstrunk 2003, Measuring colourfulness in
                   natural images)
    a judge        mean probability of the labels that the caption names, read by an `AttributeJudge`

All are pure functions of pictures and captions, and none runs code that was downloaded.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...data.emoji_scenes import NATIVE
from ...data.words import PATTERNS
from ...models import AttributeJudge


JUDGED_SIDE = 64  # pixels; what judges are trained on
# the attributes that a caption names after "on"
_PLACE = ("background", "pattern")

# from pictures (n, 3, H, W) in [-1, 1] and n captions to n numbers
Score = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


def brightness(images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """Mean brightness Y of pictures, from 0 for black to 1 for white.

    Args:
        images: (n, 3, H, W) in [-1, 1].
        captions: Not read.

    Returns:
        (n,), float32.

    Example:
        >>> brightness(torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 4, 4), ["", ""]).tolist()
        [0.0, 1.0]
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
    return ((images.float() / 2.0 + 0.5) * weights).sum(1).mean((1, 2))


def colourfulness(images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """Colourfulness of pictures, 0 for grey ones; to its authors' observers 15 was slightly and 109 extremely so.

    Args:
        images: (n, 3, H, W) in [-1, 1].
        captions: Not read.

    Returns:
        (n,), float32.
    """
    red, green, blue = ((images.float() / 2.0 + 0.5) * 255.0).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2.0 - blue], 1).flatten(2)
    deviations, means = opponents.std(2, correction=0), opponents.mean(2)
    return deviations.norm(dim=1) + 0.3 * means.norm(dim=1)


def named_labels(caption: str, labels: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The labels that a caption of an emoji scene names, e.g. "a blue star on a pink striped background".

    Background and pattern are read after "on", everything else before it. A background without a pattern's word is
    plain; an attribute that the caption does not name is left out.

    Args:
        caption: A sentence.
        labels: Attribute -> its values.

    Returns:
        Attribute -> number of the value.

    Example:
        >>> named_labels("a star on a red background", {"object": ["heart", "star"], "background": ["blue", "red"]})
        {'object': 1, 'background': 1}
    """
    thing, _, place = re.sub(r"\bon\b", "\0", caption, count=1).partition("\0")
    left = {True: place, False: thing}
    found: dict[str, int] = {}
    names = [(word, attribute) for attribute, words in labels.items() for word in words if word != NATIVE]
    # the longest name first, and taken out when it is found: an orange fruit has no colour in its name
    for word, attribute in sorted(names, key=lambda name: -len(name[0])):
        side = attribute in _PLACE
        said = re.search(rf"\b{re.escape(word)}\b", left[side])
        if said and attribute not in found:
            found[attribute] = list(labels[attribute]).index(word)
            left[side] = left[side][: said.start()] + left[side][said.end() :]
    plain = PATTERNS[0]
    if place and "pattern" not in found and plain in labels.get("pattern", ()):
        found["pattern"] = list(labels["pattern"]).index(plain)
    return {attribute: found[attribute] for attribute in labels if attribute in found}


class JudgedMatch:
    """How well pictures show what their captions say: the mean probability of the labels named there, in [0, 1].

    Args:
        judge: Reads the labels. Pictures of another size than 64 pixels are resized for it.
    """

    def __init__(self, judge: AttributeJudge):
        self.judge = judge.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Rewards (n,) of pictures (n, 3, H, W) in [-1, 1].

        Raises:
            ValueError: If a caption names none of the judge's labels.
        """
        if images.shape[2:] != (JUDGED_SIDE, JUDGED_SIDE):
            images = F.interpolate(images.float(), (JUDGED_SIDE, JUDGED_SIDE), mode="bilinear", antialias=True)
        logits = self.judge(images.to(self.judge.device, self.judge.dtype))
        chances = {name: value.float().softmax(1) for name, value in logits.items()}
        rewards = []
        for row, caption in enumerate(captions):
            wanted = named_labels(caption, self.judge.config.labels)
            if not wanted:
                raise ValueError(
                    f"the caption {caption!r} names no label that the judge of --reward knows; give captions with its "
                    f"words, e.g. {', '.join(list(self.judge.config.labels.values())[0][:3])}, or a built-in reward"
                )
            rewards.append(torch.stack([chances[name][row, value] for name, value in wanted.items()]).mean())
        return torch.stack(rewards)


REWARDS: dict[str, Score] = {"brightness": brightness, "colourfulness": colourfulness}


@dataclass(frozen=True)
class Reward:
    """A reward with what identifies it.

    Args:
        name: A built-in one, or the folder or Hub id of a judge.
        score: Computes it.
        models: Networks whose weights it depends on.
    """

    name: str
    score: Score
    models: tuple[nn.Module, ...] = ()

    def __call__(self, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Rewards (n,), float32, of pictures (n, 3, H, W) in [-1, 1] with their captions.

        Raises:
            ValueError: If there is not one caption a picture, or a reward is not finite.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(captions):
            raise ValueError(
                f"images have shape {tuple(images.shape)} and there are {len(captions)} captions; give (n, 3, H, W) "
                f"and n"
            )
        rewards = self.score(images, captions).float()
        if rewards.shape != images.shape[:1] or not bool(torch.isfinite(rewards).all()):
            raise ValueError(f"reward={self.name!r} gives no finite number a picture; give another")
        return rewards


def make_reward(name: str, device: torch.device | str = "cpu") -> Reward:
    """The reward that `--reward` names.

    Args:
        name: One of `REWARDS`, or the folder or Hub id of an `AttributeJudge`.
        device: Where a judge is put.

    Raises:
        ValueError: If it is neither.
    """
    if name in REWARDS:
        return Reward(name, REWARDS[name])
    known = f"give one of {', '.join(REWARDS)}, or the folder or Hub id of an AttributeJudge"
    try:
        kind = AttributeJudge.load_config(name).get("_class_name")
        if kind != AttributeJudge.__name__:
            raise ValueError(f"reward={name!r} is a {kind}; {known}")
        judge = AttributeJudge.from_pretrained(name, use_safetensors=True).to(device)
    except OSError as error:
        raise ValueError(f"reward={name!r} cannot be loaded ({str(error).splitlines()[0]}); {known}") from error
    return Reward(name, JudgedMatch(judge), (judge,))
