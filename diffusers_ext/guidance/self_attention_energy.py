"""The energy that holds the layout of a picture: its self-attention.

Guide-and-Rescale, 2024, arXiv 2409.01322. With A the self-attention probabilities of the edit and A* those of the source at the
same noise level, heads separate:

    E = sum over layers of mean((A - A*)^2)

The mean runs over heads and pairs of tokens. A is `(heads, tokens, tokens)`: at 512 pixels the five outermost layers of Stable
Diffusion 1.x have 537 MB each, which is why no map is ever kept (see `attention/self_attention.py`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from ..attention import (
    SelfAttentionEnergyProcessor,
    SelfAttentionRecord,
    installed_processors,
    select_self_attention_layers,
)
from ..attention.self_attention import Phase
from .energies import LOSSES, Branch, EnergyProbe, GuidanceEnergy, GuidanceState, Scale, _scale_text


class SelfAttentionEnergy(GuidanceEnergy):
    """Holds the layout: the difference of self-attention probabilities, summed over layers.

    Args:
        scale (`float` or `Callable`, *optional*, defaults to 300 000):
            Weight, the authors' for editing, or a function `(step, num_steps)` of it. Large because the mean runs over all
            pairs of tokens.
        layers (`str`, `int`, or list of either, *optional*, defaults to `"all"`):
            `"all"`; names of self-attention layers or leading parts of names (`"mid_block"`, `"up_blocks.1"`); or numbers of
            tokens, which choose the layers that have as many (256 for 16 x 16). A list of both takes what fits any of them.
        max_attention_resolution (`int`, *optional*):
            Leaves out layers with more tokens than a square of this side: at 32 those of 64 x 64 tokens, which cost most of
            the memory and hold fine texture more than layout. None leaves out none.
        loss (`str`, *optional*, defaults to `"l2"`):
            `"l2"` (mean squared) or `"l1"` (mean absolute) difference.
        branch (`str`, *optional*, defaults to `"source"`):
            Prompt of the edit's pass that is compared, `"source"` or `"target"`.
        reduction (`str`, *optional*, defaults to `"sum"`):
            Over layers: `"sum"`, the authors', or `"mean"`, which makes scales comparable between networks. Stable Diffusion
            1.x has 16 layers, SDXL 70.

    Raises:
        ValueError: If an argument is wrong, or, when used, if a name or a number of tokens fits no layer.

    Example:
        ```python
        from diffusers_ext import FeatureEnergy, SelfAttentionEnergy

        guiders = [SelfAttentionEnergy(layers=["mid_block", "up_blocks"], max_attention_resolution=32), FeatureEnergy()]
        ```
    """

    def __init__(
        self,
        scale: Scale = 3e5,
        layers: str | int | Sequence[str | int] = "all",
        max_attention_resolution: int | None = None,
        loss: Literal["l1", "l2"] = "l2",
        branch: Branch = "source",
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__(scale, branch)
        chosen = [layers] if isinstance(layers, (str, int)) else list(layers) if isinstance(layers, Sequence) else []
        if not chosen or not all(_layer(item) for item in chosen):
            raise ValueError(f"layers={layers!r} is neither 'all' nor names of layers or numbers of tokens")
        side = max_attention_resolution
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
            raise ValueError(f"max_attention_resolution={side!r} is not a whole number of at least 1, or None")
        if not isinstance(loss, str) or loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is not one of {', '.join(LOSSES)}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} is not one of sum, mean")
        self.layers = layers if isinstance(layers, (str, int)) else tuple(chosen)
        self.max_attention_resolution = side
        self.loss = loss
        self.reduction = reduction
        self.zero_at_reference = branch == "source"
        self._names = [item for item in chosen if isinstance(item, str)]
        self._tokens = {item for item in chosen if isinstance(item, int)}

    @contextmanager
    def attach(self, unet: nn.Module) -> Iterator[EnergyProbe]:
        # With numbers of tokens any layer may fit: how many it has shows when it runs.
        by_name = select_self_attention_layers(unet, self._names) if self._names else {}
        layers = select_self_attention_layers(unet, "all") if self._tokens else by_name
        record = SelfAttentionRecord(LOSSES[self.loss], self.branch)

        def reads(name: str, tokens: int) -> bool:
            within = self.max_attention_resolution is None or tokens <= self.max_attention_resolution**2
            return within and (name in by_name or tokens in self._tokens)

        with installed_processors(
            layers, lambda name, before: SelfAttentionEnergyProcessor(name, record, before, reads)
        ):
            yield _SelfAttentionProbe(record, self)

    def __repr__(self) -> str:
        limit = "" if self.max_attention_resolution is None else f", up to {self.max_attention_resolution}"
        return f"SelfAttentionEnergy(scale={_scale_text(self.scale)}, layers={self.layers!r}{limit})"


def _layer(item: object) -> bool:
    return bool(item) if isinstance(item, str) else isinstance(item, int) and not isinstance(item, bool) and item > 0


class _SelfAttentionProbe:
    def __init__(self, record: SelfAttentionRecord, energy: SelfAttentionEnergy) -> None:
        self._record = record
        self._energy = energy

    def begin(self, phase: Phase) -> None:
        self._record.phase = phase

    def energy(self, state: GuidanceState) -> torch.Tensor:
        found = self._record.energies
        if not found:
            there = ", ".join(str(tokens) for tokens in sorted(self._record.tokens))
            raise ValueError(
                f"layers={self._energy.layers!r} with max_attention_resolution={self._energy.max_attention_resolution} "
                f"leaves SelfAttentionEnergy no layer; for this picture layers have {there} tokens"
            )
        stacked = torch.stack(list(found.values()))
        return stacked.sum(0) if self._energy.reduction == "sum" else stacked.mean(0)
