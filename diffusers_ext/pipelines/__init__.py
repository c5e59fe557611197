"""Pipelines, one method a file."""

from .pipeline_ctm import CTMPipeline
from .pipeline_flowchef import FlowChefPipeline
from .pipeline_flowchef_flux import FlowChefFluxPipeline
from .pipeline_flowchef_pixel import FlowChefPixelPipeline
from .pipeline_flowchef_sd3 import FlowChefStableDiffusion3Pipeline
from .pipeline_guide_and_rescale import GuideAndRescalePipeline, GuideAndRescalePipelineOutput
from .pipeline_guide_and_rescale_sdxl import GuideAndRescaleStableDiffusionXLPipeline
from .pipeline_mr_restoration import MRRestorationPipeline, MRRestorationPipelineOutput
from .pipeline_null_text_inversion import NullTextInversionPipeline, NullTextInversionPipelineOutput
from .pipeline_null_text_inversion_sdxl import NullTextInversionStableDiffusionXLPipeline
from .pipeline_rolling_ladder import RollingLadderPipeline, RollingLadderPipelineOutput
from .similarity_filter import SimilarityFilter
from .stream_batch import StreamBatch


__all__ = [
    "CTMPipeline",
    "FlowChefFluxPipeline",
    "FlowChefPipeline",
    "FlowChefPixelPipeline",
    "FlowChefStableDiffusion3Pipeline",
    "GuideAndRescalePipeline",
    "GuideAndRescalePipelineOutput",
    "GuideAndRescaleStableDiffusionXLPipeline",
    "MRRestorationPipeline",
    "MRRestorationPipelineOutput",
    "NullTextInversionPipeline",
    "NullTextInversionPipelineOutput",
    "NullTextInversionStableDiffusionXLPipeline",
    "RollingLadderPipeline",
    "RollingLadderPipelineOutput",
    "SimilarityFilter",
    "StreamBatch",
]
