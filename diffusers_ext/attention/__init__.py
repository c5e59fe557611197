"""Processors that read or edit attention."""

from .self_attention import (
    SelfAttentionEnergyProcessor,
    SelfAttentionRecord,
    installed_processors,
    select_self_attention_layers,
    self_attention_layers,
)


__all__ = [
    "SelfAttentionEnergyProcessor",
    "SelfAttentionRecord",
    "installed_processors",
    "select_self_attention_layers",
    "self_attention_layers",
]
