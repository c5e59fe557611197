"""Energies that guide sampling, and their rescaling."""

from .conditions import Condition, join_conditions, part_of_condition, text_condition
from .energies import EnergyProbe, GuidanceEnergy, GuidanceState, mean_absolute, mean_square, weight_of
from .feature_energy import FeatureEnergy, find_layer
from .guided_step import GuidedStep, GuidedStepOutput
from .presets import PRESETS, SDXL_PRESETS, GuidancePreset
from .rescale import NormRescaler, rescale_factor, sample_norm
from .self_attention_energy import SelfAttentionEnergy


__all__ = [
    "PRESETS",
    "SDXL_PRESETS",
    "Condition",
    "EnergyProbe",
    "FeatureEnergy",
    "GuidanceEnergy",
    "GuidancePreset",
    "GuidanceState",
    "GuidedStep",
    "GuidedStepOutput",
    "NormRescaler",
    "SelfAttentionEnergy",
    "find_layer",
    "join_conditions",
    "mean_absolute",
    "mean_square",
    "part_of_condition",
    "rescale_factor",
    "sample_norm",
    "text_condition",
    "weight_of",
]
