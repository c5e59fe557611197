"""From pictures to latents at every noise level."""

from .bdia import BDIAPair, bdia_inversion, bdia_invert, bdia_regenerate
from .ddim import (
    ALIGNMENTS,
    DDIMLadder,
    ddim_inversion,
    ddim_inversion_states,
    ddim_step,
    epsilon_from_v,
    sampling_factors,
    v_from_epsilon,
)
from .denoiser import (
    Denoiser,
    InversionCallback,
    InversionProgress,
    InversionStoppedError,
    Inverted,
    with_guidance,
)
from .direct import direct_inversion
from .edit_friendly import edit_friendly_inversion, stochastic_step
from .fixed_point import anderson_mix, fixed_point_inversion
from .interpolate import interpolate, noise_diffusion_weights
from .methods import DEFAULT_INVERSION, INVERSIONS, InversionMethod, invert
from .negative_prompt import negative_prompt_inversion, slerp
from .null_text import NullTextSchedule, null_text_inversion
from .output import InversionOutput, model_fingerprint
from .regenerate import regenerate, regenerate_states


__all__ = [
    "ALIGNMENTS",
    "BDIAPair",
    "DDIMLadder",
    "DEFAULT_INVERSION",
    "Denoiser",
    "INVERSIONS",
    "InversionCallback",
    "InversionMethod",
    "InversionOutput",
    "InversionProgress",
    "InversionStoppedError",
    "Inverted",
    "NullTextSchedule",
    "anderson_mix",
    "bdia_inversion",
    "bdia_invert",
    "bdia_regenerate",
    "ddim_inversion",
    "ddim_inversion_states",
    "ddim_step",
    "direct_inversion",
    "edit_friendly_inversion",
    "epsilon_from_v",
    "fixed_point_inversion",
    "interpolate",
    "invert",
    "model_fingerprint",
    "negative_prompt_inversion",
    "noise_diffusion_weights",
    "null_text_inversion",
    "regenerate",
    "regenerate_states",
    "sampling_factors",
    "slerp",
    "stochastic_step",
    "v_from_epsilon",
    "with_guidance",
]
