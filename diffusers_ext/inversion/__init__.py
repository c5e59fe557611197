"""From pictures to latents at every noise level."""

from .bdia import BDIAPair, bdia_invert, bdia_regenerate
from .ddim import (
    ALIGNMENTS,
    DDIMLadder,
    ddim_inversion_states,
    ddim_step,
    epsilon_from_v,
    v_from_epsilon,
)
from .output import InversionOutput, model_fingerprint


__all__ = [
    "ALIGNMENTS",
    "BDIAPair",
    "DDIMLadder",
    "InversionOutput",
    "bdia_invert",
    "bdia_regenerate",
    "ddim_inversion_states",
    "ddim_step",
    "epsilon_from_v",
    "model_fingerprint",
    "v_from_epsilon",
]
