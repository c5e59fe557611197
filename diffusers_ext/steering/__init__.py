"""Objectives and linear operators that steer the samples of flow models, and the exchange of a pipeline's scheduler for one that can."""

from .blur import Blur, MotionBlur
from .calibration import velocity_errors
from .composition import Compose
from .differentiable import ClassifierObjective, DecodedObjective, FunctionObjective
from .objectives import (
    LatentMaskObjective,
    MeasurementObjective,
    Objective,
    PackedObjective,
    StagedObjective,
    SumObjective,
)
from .official import OFFICIAL_TASKS, OfficialSettings, official_settings
from .operators import FromDeepinv, InpaintMask, LinearOperator
from .resampling import GaussianBlur, SuperResolution
from .swap import steer, steerable


__all__ = [
    "OFFICIAL_TASKS",
    "Blur",
    "ClassifierObjective",
    "Compose",
    "DecodedObjective",
    "FromDeepinv",
    "FunctionObjective",
    "GaussianBlur",
    "InpaintMask",
    "LatentMaskObjective",
    "LinearOperator",
    "MeasurementObjective",
    "MotionBlur",
    "Objective",
    "OfficialSettings",
    "PackedObjective",
    "StagedObjective",
    "SumObjective",
    "SuperResolution",
    "official_settings",
    "steer",
    "steerable",
    "velocity_errors",
]
