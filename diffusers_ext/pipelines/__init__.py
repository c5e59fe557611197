"""Pipelines, one method a file."""

from .pipeline_guide_and_rescale import GuideAndRescalePipeline, GuideAndRescalePipelineOutput


__all__ = ["GuideAndRescalePipeline", "GuideAndRescalePipelineOutput"]
