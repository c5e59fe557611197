"""Processors that read or edit attention."""

from .alignment import align_tokens, prompt_words, refinement_mapper, replacement_mapper, word_indices
from .controller_group import ControllerGroup
from .local_blend import LocalBlend
from .maps import map_sizes
from .prompt_to_prompt import AttentionController, AttentionRefine, AttentionReplace, AttentionReweight, controller_for
from .self_attention import (
    SelfAttentionEnergyProcessor,
    SelfAttentionRecord,
    installed_processors,
    select_self_attention_layers,
    self_attention_layers,
)
from .word_steps import equalizer, word_schedule


__all__ = [
    "AttentionController",
    "AttentionRefine",
    "AttentionReplace",
    "AttentionReweight",
    "ControllerGroup",
    "LocalBlend",
    "SelfAttentionEnergyProcessor",
    "SelfAttentionRecord",
    "align_tokens",
    "controller_for",
    "equalizer",
    "installed_processors",
    "map_sizes",
    "prompt_words",
    "refinement_mapper",
    "replacement_mapper",
    "select_self_attention_layers",
    "self_attention_layers",
    "word_indices",
    "word_schedule",
]
