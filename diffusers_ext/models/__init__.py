"""Networks that diffusers lacks.

Each module is imported here eagerly: diffusers finds the class that a saved `model_index.json` names only if its module is
already in `sys.modules`.
"""

from .attribute_judge import AttributeJudge
from .frame_adapters import LTXFrameAdapter, SkyReelsV2FrameAdapter, WanFrameAdapter
from .restoration_unet_2d import RestorationUNet2DModel
from .rolling_transformer_1d import RollingTransformer1DModel


__all__ = [
    "AttributeJudge",
    "LTXFrameAdapter",
    "RestorationUNet2DModel",
    "RollingTransformer1DModel",
    "SkyReelsV2FrameAdapter",
    "WanFrameAdapter",
]
