"""Guide-and-Rescale written down once more, as plainly as the paper has it, to compare the real one with.

Nothing is shared with the library: every prompt has a pass of its own, all attention maps are stored, the gradient is one
`autograd.grad` over everything, norms are those of the one picture. It reproduces the authors' recorded runs (asserted in
`test_plain_reference.py`), which is what makes it a reference for the settings of which no run was recorded.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel


@dataclass
class PlainSettings:
    """The authors' options; the defaults are those of their configuration for editing."""

    attention_scale: float = 3e5
    attention_layers: tuple[str, ...] | None = None
    feature_scale: float = 500.0
    feature_layer: str = "up_blocks.1"
    feature_power: int = 1
    feature_prompt: str = "source"
    guided_steps: int = 6
    bounds: tuple[float, float] = (0.33, 3.0)
    negative_is_source: bool = False
    guidance_scale: float = 7.5


@dataclass
class _Seen:
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    features: torch.Tensor | None = None


class _StoringProcessor:
    def __init__(self, name: str, seen: _Seen) -> None:
        self.name, self.seen = name, seen

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch, tokens, width = hidden_states.shape
        split = [
            layer(hidden_states).view(batch, tokens, attn.heads, -1).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        ]
        query, key, value = split
        probabilities = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1)
        self.seen.maps[self.name] = probabilities
        return attn.to_out[0]((probabilities @ value).transpose(1, 2).reshape(batch, tokens, width))


def _look(
    unet: UNet2DConditionModel, latents: torch.Tensor, t: int, words: torch.Tensor, settings: PlainSettings
) -> Any:
    """A pass: the prediction, the maps and the features."""
    seen = _Seen()
    before = unet.attn_processors
    chosen = settings.attention_layers
    replaced = {
        name: _StoringProcessor(name, seen)
        if ".attn1." in name and (chosen is None or name.startswith(chosen))
        else processor
        for name, processor in before.items()
    }

    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen.features = output

    handle = unet.get_submodule(settings.feature_layer).register_forward_hook(keep)
    unet.set_attn_processor(replaced)
    try:
        prediction = unet(latents, t, encoder_hidden_states=words).sample
    finally:
        unet.set_attn_processor(before)
        handle.remove()
    return prediction, seen


def plain_noise(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    reference: torch.Tensor,
    t: int,
    words: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    settings: PlainSettings,
    guided: bool,
) -> torch.Tensor:
    """The rescaled prediction of one step; `words` are the negative, the source and the target prompt."""
    negative, source, target = words
    if settings.negative_is_source:
        negative = source
    z = latents.detach().clone().requires_grad_(True)
    away, towards = (unet(z, t, encoder_hidden_states=w).sample.detach() for w in (negative, target))
    classifier_free = settings.guidance_scale * (towards - away)
    if not guided:
        return away + classifier_free
    with torch.no_grad():
        _, wanted = _look(unet, reference, t, source, settings)
    _, found = _look(unet, z, t, source, settings)
    _, styled = _look(unet, z, t, target if settings.feature_prompt == "target" else source, settings)
    attention = sum((found.maps[name] - wanted.maps[name]).square().mean() for name in wanted.maps)
    features = (styled.features - wanted.features).abs().pow(settings.feature_power).mean()
    energy = settings.attention_scale * attention + settings.feature_scale * features
    (gradient,) = torch.autograd.grad(energy, z)
    if gradient.abs().max() < 1e-8:  # the authors compare the energy with 0: edit and source are still the same
        return away + classifier_free
    ratio = gradient.norm() / classifier_free.norm()
    low, high = settings.bounds
    return away + classifier_free + ratio.clamp(low, high) / ratio * gradient


def plain_edit(
    unet: UNet2DConditionModel,
    inverted: torch.Tensor,
    timesteps: list[int],
    alpha_bars: torch.Tensor,
    final_alpha_bar: float,
    words: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    settings: PlainSettings,
) -> torch.Tensor:
    """A whole edit from inverted latents, `(steps + 1, 1, channels, height, width)`, the picture first."""
    steps = len(timesteps)
    levels = [*alpha_bars.tolist(), final_alpha_bar]
    z = inverted[-1]
    for i, t in enumerate(timesteps):
        noise = plain_noise(unet, z, inverted[steps - i], t, words, settings, i < settings.guided_steps)
        clean = (z - (1 - levels[i]) ** 0.5 * noise) / levels[i] ** 0.5
        z = levels[i + 1] ** 0.5 * clean + (1 - levels[i + 1]) ** 0.5 * noise
    return z
