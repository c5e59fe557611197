"""Extensions of diffusers: samplers, editing, inversion, steering and training methods.

Schedulers and models are imported together with the package, because diffusers can only load a saved component whose module
is already imported. Everything else is looked up on first use, so that `import diffusers_ext` costs little more than
`import diffusers`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import models, schedulers


if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from .attention import AttentionRefine, AttentionReplace, AttentionReweight, LocalBlend
    from .guidance import FeatureEnergy, NormRescaler, SelfAttentionEnergy
    from .inversion import InversionOutput
    from .models import (
        LTXFrameAdapter,
        RestorationUNet2DModel,
        RollingTransformer1DModel,
        SkyReelsV2FrameAdapter,
        WanFrameAdapter,
    )
    from .pipelines import (
        CTMPipeline,
        FlowChefFluxPipeline,
        FlowChefPipeline,
        FlowChefPixelPipeline,
        FlowChefStableDiffusion3Pipeline,
        GuideAndRescalePipeline,
        GuideAndRescalePipelineOutput,
        GuideAndRescaleStableDiffusionXLPipeline,
        MRRestorationPipeline,
        MRRestorationPipelineOutput,
        NullTextInversionPipeline,
        NullTextInversionPipelineOutput,
        NullTextInversionStableDiffusionXLPipeline,
        RollingLadderPipeline,
        RollingLadderPipelineOutput,
        SimilarityFilter,
        StreamBatch,
    )
    from .schedulers import (
        AdaptiveAdamsScheduler,
        BDIADDIMInverseScheduler,
        BDIADDIMScheduler,
        CTMScheduler,
        EVODiffScheduler,
        FLAIRScheduler,
        FlowChefDPMSolverMultistepScheduler,
        FlowChefHeunScheduler,
        FlowChefLCMScheduler,
        FlowChefScheduler,
        FlowChefUniPCMultistepScheduler,
        GHVBScheduler,
        HeavyBallDPMSolverMultistepScheduler,
        HeavyBallUniPCMultistepScheduler,
        MeanRevertingAdapter,
        MRScheduler,
        ResfusionScheduler,
        RollingLadderScheduler,
    )
    from .steering import (
        Compose,
        FromDeepinv,
        GaussianBlur,
        InpaintMask,
        LinearOperator,
        MotionBlur,
        SuperResolution,
    )


__version__ = "0.1.0"

# public name -> module it is read from. The two mixins are here because diffusers recognises a component by the base
# classes that it finds in the namespace of the package that the component comes from.
_LAZY = {
    "AdaptiveAdamsScheduler": "diffusers_ext.schedulers",
    "AttentionRefine": "diffusers_ext.attention",
    "AttentionReplace": "diffusers_ext.attention",
    "AttentionReweight": "diffusers_ext.attention",
    "BDIADDIMInverseScheduler": "diffusers_ext.schedulers",
    "BDIADDIMScheduler": "diffusers_ext.schedulers",
    "CTMPipeline": "diffusers_ext.pipelines",
    "CTMScheduler": "diffusers_ext.schedulers",
    "Compose": "diffusers_ext.steering",
    "EVODiffScheduler": "diffusers_ext.schedulers",
    "FLAIRScheduler": "diffusers_ext.schedulers",
    "FeatureEnergy": "diffusers_ext.guidance",
    "FlowChefDPMSolverMultistepScheduler": "diffusers_ext.schedulers",
    "FlowChefFluxPipeline": "diffusers_ext.pipelines",
    "FlowChefHeunScheduler": "diffusers_ext.schedulers",
    "FlowChefLCMScheduler": "diffusers_ext.schedulers",
    "FlowChefPipeline": "diffusers_ext.pipelines",
    "FlowChefPixelPipeline": "diffusers_ext.pipelines",
    "FlowChefScheduler": "diffusers_ext.schedulers",
    "FlowChefStableDiffusion3Pipeline": "diffusers_ext.pipelines",
    "FlowChefUniPCMultistepScheduler": "diffusers_ext.schedulers",
    "FromDeepinv": "diffusers_ext.steering",
    "GHVBScheduler": "diffusers_ext.schedulers",
    "GaussianBlur": "diffusers_ext.steering",
    "GuideAndRescalePipeline": "diffusers_ext.pipelines",
    "GuideAndRescalePipelineOutput": "diffusers_ext.pipelines",
    "GuideAndRescaleStableDiffusionXLPipeline": "diffusers_ext.pipelines",
    "HeavyBallDPMSolverMultistepScheduler": "diffusers_ext.schedulers",
    "HeavyBallUniPCMultistepScheduler": "diffusers_ext.schedulers",
    "InpaintMask": "diffusers_ext.steering",
    "InversionOutput": "diffusers_ext.inversion",
    "LTXFrameAdapter": "diffusers_ext.models",
    "LinearOperator": "diffusers_ext.steering",
    "LocalBlend": "diffusers_ext.attention",
    "MRRestorationPipeline": "diffusers_ext.pipelines",
    "MRRestorationPipelineOutput": "diffusers_ext.pipelines",
    "MRScheduler": "diffusers_ext.schedulers",
    "MeanRevertingAdapter": "diffusers_ext.schedulers",
    "ModelMixin": "diffusers",
    "MotionBlur": "diffusers_ext.steering",
    "NormRescaler": "diffusers_ext.guidance",
    "NullTextInversionPipeline": "diffusers_ext.pipelines",
    "NullTextInversionPipelineOutput": "diffusers_ext.pipelines",
    "NullTextInversionStableDiffusionXLPipeline": "diffusers_ext.pipelines",
    "ResfusionScheduler": "diffusers_ext.schedulers",
    "RestorationUNet2DModel": "diffusers_ext.models",
    "RollingLadderPipeline": "diffusers_ext.pipelines",
    "RollingLadderPipelineOutput": "diffusers_ext.pipelines",
    "RollingLadderScheduler": "diffusers_ext.schedulers",
    "RollingTransformer1DModel": "diffusers_ext.models",
    "SchedulerMixin": "diffusers",
    "SelfAttentionEnergy": "diffusers_ext.guidance",
    "SimilarityFilter": "diffusers_ext.pipelines",
    "SkyReelsV2FrameAdapter": "diffusers_ext.models",
    "StreamBatch": "diffusers_ext.pipelines",
    "SuperResolution": "diffusers_ext.steering",
    "WanFrameAdapter": "diffusers_ext.models",
}

__all__ = [
    "AdaptiveAdamsScheduler",
    "AttentionRefine",
    "AttentionReplace",
    "AttentionReweight",
    "BDIADDIMInverseScheduler",
    "BDIADDIMScheduler",
    "CTMPipeline",
    "CTMScheduler",
    "Compose",
    "EVODiffScheduler",
    "FLAIRScheduler",
    "FeatureEnergy",
    "FlowChefDPMSolverMultistepScheduler",
    "FlowChefFluxPipeline",
    "FlowChefHeunScheduler",
    "FlowChefLCMScheduler",
    "FlowChefPipeline",
    "FlowChefPixelPipeline",
    "FlowChefScheduler",
    "FlowChefStableDiffusion3Pipeline",
    "FlowChefUniPCMultistepScheduler",
    "FromDeepinv",
    "GHVBScheduler",
    "GaussianBlur",
    "GuideAndRescalePipeline",
    "GuideAndRescalePipelineOutput",
    "GuideAndRescaleStableDiffusionXLPipeline",
    "HeavyBallDPMSolverMultistepScheduler",
    "HeavyBallUniPCMultistepScheduler",
    "InpaintMask",
    "InversionOutput",
    "LTXFrameAdapter",
    "LinearOperator",
    "LocalBlend",
    "MRRestorationPipeline",
    "MRRestorationPipelineOutput",
    "MRScheduler",
    "MeanRevertingAdapter",
    "ModelMixin",
    "MotionBlur",
    "NormRescaler",
    "NullTextInversionPipeline",
    "NullTextInversionPipelineOutput",
    "NullTextInversionStableDiffusionXLPipeline",
    "ResfusionScheduler",
    "RestorationUNet2DModel",
    "RollingLadderPipeline",
    "RollingLadderPipelineOutput",
    "RollingLadderScheduler",
    "RollingTransformer1DModel",
    "SchedulerMixin",
    "SelfAttentionEnergy",
    "SimilarityFilter",
    "SkyReelsV2FrameAdapter",
    "StreamBatch",
    "SuperResolution",
    "WanFrameAdapter",
    "__version__",
    "models",
    "register",
    "schedulers",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> tuple[str, ...]:
    """Makes the pipelines of this package visible to `DiffusionPipeline.from_pretrained`.

    diffusers looks a saved pipeline's `_class_name` up among its own attributes, so it cannot find a class of another
    package. This sets ours there. It is never done on import, may be called any number of times, and does not replace
    a name that diffusers already has.

    Returns:
        `tuple[str, ...]`: The names of the registered pipelines.

    Raises:
        RuntimeError: If diffusers has another class of the same name. Nothing is registered then.

    Example:
        ```python
        import diffusers_ext

        names = diffusers_ext.register()
        assert "GuideAndRescalePipeline" in names
        ```
    """
    import diffusers

    pipelines = {name: __getattr__(name) for name in _LAZY if name.endswith("Pipeline")}
    for name, pipeline in pipelines.items():
        present = getattr(diffusers, name, pipeline)
        if present is not pipeline:
            raise RuntimeError(
                f"diffusers already has another `{name}` (from {present.__module__}); it is left as it is: use "
                f"`diffusers_ext.{name}.from_pretrained(...)` instead of `register()`."
            )
    for name, pipeline in pipelines.items():
        setattr(diffusers, name, pipeline)
    return tuple(pipelines)
