"""The authors' settings for the two kinds of edit, by name.

Guide-and-Rescale, 2024, arXiv 2409.01322, and the constants of its published configurations. `edit` changes what is there and
keeps the rest as it was; `stylize` repaints everything and keeps the layout. With the fixed ratio of the latter the energies'
scales only set their mix.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .energies import GuidanceEnergy
from .feature_energy import FeatureEnergy
from .self_attention_energy import SelfAttentionEnergy


# Self-attention layers of Stable Diffusion 1.x, over which the authors' scales are meant to be summed.
SD1_LAYERS = 16


@dataclass(frozen=True)
class GuidancePreset:
    """Settings that belong together.

    Attributes:
        guiders (`Callable`): Makes the energies.
        rescale_range (`tuple[float, float]`): Bounds of the gradient's norm relative to that of the classifier-free term.
        guidance_end (`float`): Part of the steps that are guided.
    """

    guiders: Callable[[], list[GuidanceEnergy]]
    rescale_range: tuple[float, float]
    guidance_end: float


PRESETS: Mapping[str, GuidancePreset] = MappingProxyType(
    {
        "edit": GuidancePreset(lambda: [SelfAttentionEnergy(3e5), FeatureEnergy(500.0)], (0.33, 3.0), 0.6),
        "stylize": GuidancePreset(
            lambda: [SelfAttentionEnergy(1e5), FeatureEnergy(2.5, "up_blocks.1.resnets.1", "l2", branch="target")],
            (1.5, 1.5),
            0.5,
        ),
    }
)

# The authors did not run SDXL. Its 70 layers are averaged, and only those of at most 32 x 32 tokens at 1024 pixels are read:
# the middle and the first up block, where the layout is decided.
_SDXL_LAYERS = ("mid_block", "up_blocks.0")

SDXL_PRESETS: Mapping[str, GuidancePreset] = MappingProxyType(
    {
        "edit": GuidancePreset(
            lambda: [SelfAttentionEnergy(SD1_LAYERS * 3e5, _SDXL_LAYERS, reduction="mean"), FeatureEnergy(500.0)],
            (0.33, 3.0),
            0.6,
        ),
        "stylize": GuidancePreset(
            lambda: [
                SelfAttentionEnergy(SD1_LAYERS * 1e5, _SDXL_LAYERS, reduction="mean"),
                FeatureEnergy(2.5, "up_blocks.1.resnets.1", "l2", branch="target"),
            ],
            (1.5, 1.5),
            0.5,
        ),
    }
)
