"""The attention processor behind prompt-to-prompt.

It lets the processor that the layer had compute its output, whatever that is: PyTorch's fused attention, slices, an
IP-Adapter's with its extra tokens, on projections with LoRA. To the rows of the targets it then adds what the edit
changes,

    W_out (A' - A) V

with A the text attention that those projections give and A' the edited one. Attention is linear in A, so the sum is
the layer with A' in place of A; the unconditional half, the source and whatever is not edited stay as they were, bit
for bit.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn


# Processors whose attention to the text is softmax(q k^T) v of the layer's own projections.
STANDARD_PROCESSORS = frozenset({
    "AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "FusedAttnProcessor2_0", "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
})  # fmt: skip


class AttentionEdit(Protocol):
    """What a processor asks of the run that it belongs to.

    The conditional rows are those of `sources` pictures, then one target of each picture in the same order, then the
    second target of each, and so on.
    """

    sources: int

    def conditional_rows(self, rows: int) -> int:
        """First of the conditional rows in a batch, or -1 where nothing is to be done."""

    def halvings(self, positions: int, name: str) -> int:
        """How often a layer's size is halved from the latents', by its number of positions."""

    def reads_cross(self) -> bool:
        """Whether cross-attention is edited or read in this step."""

    def replaces_self(self, halvings: int) -> bool:
        """Whether self-attention of this size is replaced in this step."""

    def edit_cross(self, name: str, halvings: int, maps: torch.Tensor) -> torch.Tensor:
        """Edited maps of the targets, of as many rows as there are targets, from those of all conditional rows."""


class PromptToPromptProcessor(nn.Module):
    """Adds an edit to what another processor computes.

    A module, so that an IP-Adapter's weights inside the other processor still move with the network.

    Args:
        name (`str`): The layer's name, the key of what is kept of it.
        edit ([`AttentionEdit`]): The run.
        before (`Callable`): The processor that the layer had.
    """

    def __init__(self, name: str, edit: AttentionEdit, before: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.name = name
        self.edit = edit
        self.before = before

    # Not `forward`: a layer looks at the signature of `__call__` to learn which arguments its processor takes.
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> torch.Tensor:
        given = {"attention_mask": attention_mask, "temb": temb, "ip_adapter_masks": ip_adapter_masks}
        given = {key: value for key, value in given.items() if value is not None}
        output = self.before(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, **given)
        first = self.edit.conditional_rows(len(hidden_states))
        if first < 0:
            return output
        # An IP-Adapter's picture tokens come second; they are not edited.
        text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
        positions = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states[0, 0].numel()
        halvings = self.edit.halvings(positions, self.name)
        if attn.is_cross_attention and text is not None:
            if not self.edit.reads_cross():
                return output
            query, key, value = _queries_keys_values(attn, hidden_states, text, temb, first)
            change = self._cross_change(attn, query, key, value, _part(attention_mask, first), halvings)
        elif self.edit.replaces_self(halvings):
            query, key, value = _queries_keys_values(attn, hidden_states, text, temb, first)
            change = _self_change(attn, query, key, value, _part(attention_mask, first), self.edit.sources)
        else:
            return output
        change = _project(attn, change.to(output.dtype).transpose(1, 2).flatten(2))
        if output.ndim == 4:
            change = change.transpose(1, 2).unflatten(2, output.shape[2:])
        first += self.edit.sources
        return torch.cat([output[:first], output[first:] + change])

    def _cross_change(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        halvings: int,
    ) -> torch.Tensor:
        """`(A' - A) V` of the targets, `(targets, heads, positions, width)`."""
        maps = _attention_maps(attn, query, key, mask)
        edited, sources = self.edit.edit_cross(self.name, halvings, maps), self.edit.sources
        return (edited - maps[sources:]) @ value[sources:].to(maps.dtype)


def check_editable(layers: Mapping[str, Attention]) -> None:
    """Refuses layers whose attention cannot be edited.

    Args:
        layers (`Mapping[str, Attention]`): Layers by name.

    Raises:
        ValueError: If a processor computes something else than attention of the layer's own projections, or there is
        no
            cross-attention.
    """
    if not any(layer.is_cross_attention for layer in layers.values()):
        raise ValueError(
            "the UNet has no cross-attention layer, and prompt-to-prompt edits nothing else; give a text-to-image one"
        )
    for name, layer in layers.items():
        kind = type(layer.processor).__name__
        if isinstance(layer.processor, PromptToPromptProcessor):
            raise ValueError(
                "the UNet has a prompt-to-prompt controller attached already; leave its `with` block first"
            )
        if kind not in STANDARD_PROCESSORS:
            raise ValueError(
                f"{name} has the processor {kind}, whose attention prompt-to-prompt does not know; take it off with "
                "`unet.set_default_attn_processor()`, or use one of " + ", ".join(sorted(STANDARD_PROCESSORS))
            )
        if layer.added_kv_proj_dim is not None:
            raise ValueError(
                f"{name} attends to picture and text at once (added_kv_proj_dim={layer.added_kv_proj_dim}); prompt-to-prompt "
                "needs the separate cross-attention of Stable Diffusion 1.x, 2.x or XL"
            )


def _queries_keys_values(
    attn: Attention, hidden_states: torch.Tensor, text: torch.Tensor | None, temb: torch.Tensor | None, first: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the rows from `first` on, each `(rows, heads, positions or tokens, width)`, as in diffusers' processors."""
    hidden = hidden_states[first:]
    if attn.spatial_norm is not None:
        hidden = attn.spatial_norm(hidden, _part(temb, first))
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden = attn.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
    context = hidden if text is None else text[first:]
    if text is not None and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    query, key, value = (
        projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        for projected in (attn.to_q(hidden), attn.to_k(context), attn.to_v(context))
    )
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    return query, key, value


def _attention_maps(
    attn: Attention, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Probabilities `(rows, heads, positions, tokens)`, in float32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = len(query)
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, key.shape[2], rows).to(dtype)
    scores = attn.get_attention_scores(query.flatten(0, 1).to(dtype), key.flatten(0, 1).to(dtype), mask)
    return scores.unflatten(0, (rows, -1))


def _self_change(
    attn: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sources: int,
) -> torch.Tensor:
    """`(A_src - A) V` of the targets. The map of the source comes from its queries and keys and is never formed."""
    if mask is not None:
        mask = (
            attn.prepare_attention_mask(mask, key.shape[2], len(query)).to(query.dtype).unflatten(0, (len(query), -1))
        )

    def attend(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value[sources:], attn_mask=mask, scale=attn.scale)

    def of_source(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:sources].repeat(len(tensor) // sources - 1, *[1] * (tensor.ndim - 1))

    source = attend(of_source(query), of_source(key), None if mask is None else of_source(mask))
    return source - attend(query[sources:], key[sources:], None if mask is None else mask[sources:])


def _project(attn: Attention, change: torch.Tensor) -> torch.Tensor:
    """The layer's output projection without its bias, LoRA and all; a change of 0 stays 0."""
    nothing = attn.to_out[0](torch.zeros_like(change[:1, :1]))
    return (attn.to_out[0](change) - nothing) / attn.rescale_output_factor


def _part(tensor: torch.Tensor | None, first: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[first:] if len(tensor) > first else tensor
