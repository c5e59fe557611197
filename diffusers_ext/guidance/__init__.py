"""Energies that guide sampling, and their rescaling."""

from .energies import (
    EnergyProbe,
    FeatureEnergy,
    GuidanceEnergy,
    GuidanceState,
    SelfAttentionEnergy,
    find_layer,
    mean_absolute,
    mean_square,
)
from .guided_step import GuidedStep, GuidedStepOutput
from .rescale import NormRescaler, rescale_factor, sample_norm


__all__ = [
    "EnergyProbe",
    "FeatureEnergy",
    "GuidanceEnergy",
    "GuidanceState",
    "GuidedStep",
    "GuidedStepOutput",
    "NormRescaler",
    "SelfAttentionEnergy",
    "find_layer",
    "mean_absolute",
    "mean_square",
    "rescale_factor",
    "sample_norm",
]
