"""Reading self-attention probabilities out of a UNet while it runs.

The default processors of diffusers never form the probabilities `A = softmax(q k^T / sqrt(d))`. The one here does, on chosen
layers only, and reduces them to one number per sample on the spot. Of the pass to compare with it keeps queries and keys,
not the probabilities: those are `tokens / head width` times larger (80 MB against 2.7 GB for SD 1.x at 512 pixels) and the
same operations on the same numbers give them again bit for bit. For the same reason large layers keep no probabilities for
the backward pass either: they go through in parts of a few heads, each computed again when its gradient is asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint


# Passes of a guided step: the source picture with its prompt, and the edit with the source's or with the target's.
Phase = Literal["reference", "source", "target"]

# Probabilities held at one time, as numbers: 128 MB of float32. All layers of a 64-pixel model fit in one part; the layer of
# 4096 tokens of SD 1.x goes through in four parts of two heads.
PART_SIZE = 2**25


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
    wanted = [layers] if isinstance(layers, str) else list(layers)
    if "all" in wanted:
        return found
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
            Gives `(batch,)` from the probabilities of both passes, each `(batch, heads, tokens, tokens)`. A mean over heads.
        branch (`str`, *optional*, defaults to `"source"`): The pass that is compared with the reference.
    """

    def __init__(
        self, compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], branch: Phase = "source"
    ) -> None:
        self.compare = compare
        self.branch = branch
        self.phase: Phase = "reference"
        self.queries_and_keys: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.energies: dict[str, torch.Tensor] = {}
        self.tokens: set[int] = set()


class SelfAttentionEnergyProcessor:
    """An attention processor that compares a layer's probabilities with those of an earlier pass.

    It computes what diffusers' `AttnProcessor` computes, and takes its steps in the same order. Where there is nothing to read
    it hands the call to the processor that it stands in for.

    Args:
        name (`str`): The layer's name, the key of its slot.
        record ([`SelfAttentionRecord`]): Where queries and keys are kept and energies left.
        before (`Callable`): The processor that the layer had.
        reads (`Callable`): Whether to read a layer, from its name and its number of tokens.
    """

    def __init__(
        self,
        name: str,
        record: SelfAttentionRecord,
        before: Callable[..., torch.Tensor],
        reads: Callable[[str, int], bool] = lambda name, tokens: True,
    ) -> None:
        self.name = name
        self.record = record
        self.before = before
        self.reads = reads

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states[0, 0].numel()
        self.record.tokens.add(tokens)
        if self.record.phase not in ("reference", self.record.branch) or not self.reads(self.name, tokens):
            return self.before(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        spatial_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if spatial_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch_size = context.shape[0]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], batch_size)
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

        hidden_states = attn.batch_to_head_dim(self._attend(attn, query, key, value, attention_mask))

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if spatial_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(spatial_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of `(batch * heads, tokens, width)`, leaving what the record wants of it."""
        if self.record.phase == "reference":
            self.record.queries_and_keys[self.name] = (query.detach(), key.detach())
            references = (query.detach(), key.detach())
        else:
            references = self.record.queries_and_keys[self.name]
        heads = attn.heads
        batch = len(query) // heads
        fitting = max(1, PART_SIZE // (batch * query.shape[1] * key.shape[1]))

        def by_head(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(0, (batch, heads))

        attended, energy = [], None
        for first in range(0, heads, fitting):
            part = slice(first, min(first + fitting, heads))
            tensors = [by_head(tensor)[:, part].flatten(0, 1) for tensor in (query, key, value, *references)]
            mask = attention_mask
            if mask is not None and len(mask) == len(query):
                mask = by_head(mask)[:, part].flatten(0, 1)
            share = (part.stop - part.start) / heads
            # Only where there are parts: a small layer keeps its probabilities, which costs next to nothing.
            if fitting < heads and torch.is_grad_enabled():
                out, measured = checkpoint(self._part, attn, batch, mask, *tensors, use_reentrant=False)
            else:
                out, measured = self._part(attn, batch, mask, *tensors)
            attended.append(by_head_again(out, batch))
            if measured is not None:
                energy = measured * share if energy is None else energy + measured * share
        if energy is not None:
            self.record.energies[self.name] = energy
        return torch.cat(attended, dim=1).flatten(0, 1)

    def _part(
        self,
        attn: Attention,
        batch: int,
        mask: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        reference_query: torch.Tensor,
        reference_key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        probabilities = attention_probabilities(attn, query, key, mask)
        energy = None
        if self.record.phase != "reference":
            with torch.no_grad():
                reference = attention_probabilities(attn, reference_query, reference_key, mask)
            energy = self.record.compare(by_head_again(probabilities, batch), by_head_again(reference, batch))
        return torch.bmm(probabilities.to(value.dtype), value), energy


def attention_probabilities(
    attn: Attention, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax of the scaled products of queries and keys, in float32.

    Half precision would lose the differences that energies measure: 1e-4 squared is below its smallest number.

    Args:
        attn (`Attention`): The layer, for its scale.
        query (`torch.Tensor` of shape `(batch * heads, tokens, width)`): Any floating dtype.
        key (`torch.Tensor`): The same shape.
        mask (`torch.Tensor`, *optional*): Added to the products.

    Returns:
        `torch.Tensor` of shape `(batch * heads, tokens, tokens)`: Rows that sum to 1, float32.
    """
    return attn.get_attention_scores(query.float(), key.float(), None if mask is None else mask.float())


def by_head_again(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """`(batch * heads, ...)` as `(batch, heads, ...)`."""
    return tensor.unflatten(0, (batch, -1))


@contextmanager
def installed_processors(
    layers: Mapping[str, Attention], make_processor: Callable[[str, Any], Any]
) -> Iterator[Mapping[str, Attention]]:
    """Puts processors on some attention layers for the time of a `with` block.

    The layers get back the very objects they had, also after an exception. No other layer is touched, so an IP-Adapter's
    or a user's own processors survive.

    Args:
        layers (`Mapping[str, Attention]`): Layers by name.
        make_processor (`Callable`): Makes the processor of a layer from its name and the processor that it has.

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
            _set_processor(layer, make_processor(name, before[name]))
        yield layers
    finally:
        for name, layer in layers.items():
            _set_processor(layer, before[name])


def _set_processor(layer: Attention, processor: Any) -> None:
    # Not `Attention.set_processor`: that logs "removing possibly trained weights" for a processor that soon comes back.
    if isinstance(layer._modules.get("processor"), nn.Module) and not isinstance(processor, nn.Module):
        layer._modules.pop("processor")
    layer.processor = processor
