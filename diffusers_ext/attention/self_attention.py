"""Reading self-attention probabilities out of a UNet while it runs.

The default processors of diffusers never form the probabilities `A = softmax(q k^T / sqrt(d))`. The one here does, on chosen
layers only, and reduces them to one number per sample on the spot. Of the pass to compare with it keeps queries and keys,
not the probabilities: those are `tokens / head width` times larger (80 MB against 2.7 GB for SD 1.x at 512 pixels) and the
same operations on the same numbers give them again bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import nn


Phase = Literal["reference", "source"]


def self_attention_layers(unet: nn.Module) -> dict[str, Attention]:
    """All self-attention layers of a network.

    Args:
        unet (`torch.nn.Module`): A network built from diffusers' `Attention`.

    Returns:
        `dict[str, Attention]`: Layers by dotted name, such as `"mid_block.attentions.0.transformer_blocks.0.attn1"`.
    """
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention
    }


def select_self_attention_layers(unet: nn.Module, layers: str | Sequence[str] = "all") -> dict[str, Attention]:
    """Chooses self-attention layers by name.

    Args:
        unet (`torch.nn.Module`): The network.
        layers (`str` or list of `str`, *optional*, defaults to `"all"`):
            `"all"`, or full names or leading parts of them: `"mid_block"`, `"up_blocks.1"`.

    Returns:
        `dict[str, Attention]`: The chosen layers, in the network's order.

    Raises:
        ValueError: If a name fits no layer; the message lists those there are.

    Example:
        ```python
        from diffusers import UNet2DConditionModel
        from diffusers_ext.attention import select_self_attention_layers

        unet = UNet2DConditionModel(block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
                                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        assert list(select_self_attention_layers(unet, "mid_block")) == [
            "mid_block.attentions.0.transformer_blocks.0.attn1"
        ]
        ```
    """
    found = self_attention_layers(unet)
    if not found:
        raise ValueError(f"{type(unet).__name__} has no self-attention layer; leave SelfAttentionEnergy out")
    if layers == "all":
        return found
    wanted = [layers] if isinstance(layers, str) else list(layers)
    chosen = set()
    for prefix in wanted:
        fitting = [name for name in found if name == prefix or name.startswith(f"{prefix}.")]
        if not fitting:
            near = get_close_matches(prefix, found, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"layers: no self-attention layer is called {prefix!r} (did you mean {near!r}?); "
                f"there are: {', '.join(found)}"
            )
        chosen.update(fitting)
    return {name: layer for name, layer in found.items() if name in chosen}


class SelfAttentionRecord:
    """What the processors of one guided step write and read, by the name of the layer.

    A slot is overwritten, never appended to: under gradient checkpointing a processor runs a second time in the backward
    pass, and must find and leave the same.

    Args:
        compare (`Callable`):
            Gives `(batch,)` from the probabilities of both passes, each `(batch, heads, tokens, tokens)`.
    """

    def __init__(self, compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.compare = compare
        self.phase: Phase = "reference"
        self.queries_and_keys: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.energies: dict[str, torch.Tensor] = {}


class SelfAttentionEnergyProcessor:
    """An attention processor that compares a layer's probabilities with those of an earlier pass.

    It computes what diffusers' `AttnProcessor` computes, and takes its steps in the same order.

    Args:
        name (`str`): The layer's name, the key of its slot.
        record ([`SelfAttentionRecord`]): Where queries and keys are kept and energies left.
    """

    def __init__(self, name: str, record: SelfAttentionRecord) -> None:
        self.name = name
        self.record = record

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        spatial_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if spatial_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch_size, tokens, _ = context.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch_size)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states)

        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(context))
        value = attn.head_to_batch_dim(attn.to_v(context))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)

        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self._record(attn, query, key, probabilities, attention_mask)
        hidden_states = attn.batch_to_head_dim(torch.bmm(probabilities, value))

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if spatial_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(spatial_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _record(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        probabilities: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> None:
        if self.record.phase == "reference":
            self.record.queries_and_keys[self.name] = (query.detach(), key.detach())
            return
        with torch.no_grad():
            reference_query, reference_key = self.record.queries_and_keys[self.name]
            reference = attn.get_attention_scores(reference_query, reference_key, attention_mask)
        by_head = (-1, attn.heads, *probabilities.shape[1:])
        self.record.energies[self.name] = self.record.compare(probabilities.view(by_head), reference.view(by_head))


@contextmanager
def installed_processors(
    layers: Mapping[str, Attention], make_processor: Callable[[str], Any]
) -> Iterator[Mapping[str, Attention]]:
    """Puts processors on some attention layers for the time of a `with` block.

    The layers get back the very objects they had, also after an exception. No other layer is touched, so an IP-Adapter's
    or a user's own processors survive.

    Args:
        layers (`Mapping[str, Attention]`): Layers by name.
        make_processor (`Callable`): Makes the processor of a layer from its name.

    Yields:
        `Mapping[str, Attention]`: The layers.

    Raises:
        ValueError: If a layer already carries an energy's processor: two energies cannot share it.
    """
    for name, layer in layers.items():
        if isinstance(layer.processor, SelfAttentionEnergyProcessor):
            raise ValueError(
                f"two SelfAttentionEnergy guiders both read {name}; give them different layers, or use one with the sum "
                "of their scales"
            )
    before = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            _set_processor(layer, make_processor(name))
        yield layers
    finally:
        for name, layer in layers.items():
            _set_processor(layer, before[name])


def _set_processor(layer: Attention, processor: Any) -> None:
    # Not `Attention.set_processor`: that logs "removing possibly trained weights" for a processor that soon comes back.
    if isinstance(layer._modules.get("processor"), nn.Module) and not isinstance(processor, nn.Module):
        layer._modules.pop("processor")
    layer.processor = processor
