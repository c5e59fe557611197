"""One step of Guide-and-Rescale: network passes in, one prediction out.

Guide-and-Rescale, 2024, arXiv 2409.01322. With z the edit, z* the source at the same noise level, y_s, y_t, 0 the source,
target and negative prompt, w the guidance scale:

    reference pass   eps(z*, y_s)            maps and features of the source
    source pass      eps(z, y_s)             maps and features of the edit, with gradient
    g        = d/dz sum_i scale_i E_i        the network frozen
    c        = w (eps(z, y_t) - eps(z, 0))   no gradient runs through these, so no graph is built for them
    eps_hat  = eps(z, 0) + c + gamma g       gamma from `rescale.py`

For a network that predicts v, `eps = sqrt(a) v + sqrt(1 - a) z`: differences of predictions shrink by sqrt(a) on the way to
epsilon, and the gradient grows by 1 / sqrt(a) on the way back. That is all there is to "convert, add, convert back".
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..inversion.ddim import epsilon_from_v
from .energies import EnergyProbe, GuidanceEnergy, GuidanceState
from .rescale import NormRescaler, sample_norm


# Relative distance below which edit and source count as the same latents. The gradient of the L1 energy is a sign there:
# a rounding error of 1e-7 gives it its full norm, and 1e-6 on the start latents moved the result by 0.76 of 1.15.
SAME_LATENTS = 1e-4


@dataclass
class GuidedStepOutput:
    """What one step computed.

    Attributes:
        noise_pred (`torch.Tensor` of shape `(batch, channels, height, width)`): Prediction of the kind the network makes.
        gamma (`torch.Tensor` of shape `(batch,)`, *optional*): Rescaling factors; 1 where there is no gradient. None in a
            step without energies, and so are the two norms.
        guidance_norm (`torch.Tensor` of shape `(batch,)`, *optional*): Norm of the gradient in epsilon space.
        classifier_free_norm (`torch.Tensor` of shape `(batch,)`, *optional*): Norm of the classifier-free term, ditto.
        energies (`dict[str, torch.Tensor]`): Energies `(batch,)` by name, before their scales.
        forward_passes (`int`): Network evaluations of a sample; two prompts in one batch count as two.
        backward_passes (`int`): Gradients through the network.
    """

    noise_pred: torch.Tensor
    gamma: torch.Tensor | None = None
    guidance_norm: torch.Tensor | None = None
    classifier_free_norm: torch.Tensor | None = None
    energies: dict[str, torch.Tensor] = field(default_factory=dict)
    forward_passes: int = 0
    backward_passes: int = 0


@dataclass
class _Gradient:
    value: torch.Tensor
    energies: dict[str, torch.Tensor]


class GuidedStep:
    """Computes the guided prediction of one sampling step. Holds settings only, so that it can be called in any order.

    Args:
        unet (`torch.nn.Module`): Called as `unet(latents, timestep, encoder_hidden_states=..., return_dict=False)`.
        guiders (list of [`GuidanceEnergy`]): The energies; with an empty list every step is a plain one.
        rescaler ([`NormRescaler`], *optional*): Gives gamma. Defaults to the authors' bounds for editing.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"` or `"v_prediction"`.
        unet_kwargs (`dict`, *optional*): Further arguments of every pass, such as `cross_attention_kwargs`.

    Example:
        ```python
        import torch
        from diffusers import UNet2DConditionModel
        from diffusers_ext.guidance import FeatureEnergy, GuidedStep

        unet = UNet2DConditionModel(block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
                                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        words = torch.randn(3, 1, 7, 32)
        output = GuidedStep(unet, [FeatureEnergy()])(
            torch.randn(1, 4, 8, 8), timestep=500, alpha_bar=torch.tensor(0.3), guidance_scale=7.5,
            negative_embeds=words[0], target_embeds=words[1], source_embeds=words[2],
            reference_latents=torch.randn(1, 4, 8, 8),
        )
        ratio = output.gamma * output.guidance_norm / output.classifier_free_norm
        assert 0.32 < ratio.item() < 3.01
        ```
    """

    def __init__(
        self,
        unet: nn.Module,
        guiders: Sequence[GuidanceEnergy],
        rescaler: NormRescaler | None = None,
        prediction_type: str = "epsilon",
        unet_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.unet = unet
        self.guiders = list(guiders)
        self.rescaler = NormRescaler() if rescaler is None else rescaler
        self.prediction_type = prediction_type
        self.unet_kwargs = dict(unet_kwargs or {})
        self.names = _distinct_names(self.guiders)

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor | int, embeds: torch.Tensor) -> torch.Tensor:
        """One pass of the network, its prediction as it is."""
        output = self.unet(latents, timestep, encoder_hidden_states=embeds, return_dict=False, **self.unet_kwargs)
        return output[0]

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | int,
        alpha_bar: torch.Tensor,
        guidance_scale: float,
        negative_embeds: torch.Tensor | None,
        target_embeds: torch.Tensor,
        source_embeds: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
    ) -> GuidedStepOutput:
        """Computes the prediction for one step.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The edit.
            timestep (`torch.Tensor` or `int`): Scalar, what the network is asked at.
            alpha_bar (`torch.Tensor`): Scalar, noise level of `latents`.
            guidance_scale (`float`): w. As everywhere in diffusers there is no classifier-free guidance at 1 and below.
            negative_embeds (`torch.Tensor` of shape `(batch, tokens, width)`, *optional*): The negative prompt; needed
                above a `guidance_scale` of 1 and in guided steps.
            target_embeds (`torch.Tensor`): The wanted picture's prompt, same shape.
            source_embeds (`torch.Tensor`, *optional*): The source picture's prompt, same shape.
            reference_latents (`torch.Tensor`, *optional*): The source at this noise level. None makes the step plain.

        Returns:
            [`GuidedStepOutput`]: The prediction and what it was made of.

        Raises:
            ValueError: If an energy is not finite or does not depend on the latents.
        """
        guidance = None
        if self.guiders and reference_latents is not None and source_embeds is not None:
            different = _differ(latents, reference_latents)
            if bool(different.any()) or not all(_zero_at_reference(guider) for guider in self.guiders):
                guidance = self._gradient(latents, reference_latents, timestep, alpha_bar, source_embeds, different)

        if guidance is None and guidance_scale <= 1:
            return GuidedStepOutput(self.predict(latents, timestep, target_embeds), forward_passes=1)
        if negative_embeds is None:
            raise ValueError(f"negative_embeds is needed with guidance_scale={guidance_scale} and in guided steps")
        both = self.predict(torch.cat([latents] * 2), timestep, torch.cat([negative_embeds, target_embeds]))
        negative, target = both.chunk(2)
        scale = max(guidance_scale, 1.0)
        noise_pred = negative + scale * (target - negative)
        if guidance is None:
            return GuidedStepOutput(noise_pred, forward_passes=2)

        per_epsilon = alpha_bar.float() ** 0.5 if self.prediction_type == "v_prediction" else torch.ones(())
        classifier_free = per_epsilon * (scale * (target.float() - negative.float()))
        gamma, guidance_norm, classifier_free_norm = self.rescaler(guidance.value, classifier_free)
        added = gamma.view(-1, 1, 1, 1) * guidance.value / per_epsilon
        return GuidedStepOutput(
            noise_pred=noise_pred + added.to(noise_pred.dtype),
            gamma=gamma,
            guidance_norm=guidance_norm,
            classifier_free_norm=classifier_free_norm,
            energies=guidance.energies,
            forward_passes=4,
            backward_passes=1,
        )

    def _gradient(
        self,
        latents: torch.Tensor,
        reference_latents: torch.Tensor,
        timestep: torch.Tensor | int,
        alpha_bar: torch.Tensor,
        source_embeds: torch.Tensor,
        different: torch.Tensor,
    ) -> _Gradient:
        """Gradient of the weighted energies to the latents, float32, in epsilon space."""
        network = getattr(self.unet, "_orig_mod", self.unet)
        with ExitStack() as stack:
            stack.enter_context(frozen(network))
            probes: list[EnergyProbe] = [stack.enter_context(guider.attach(network)) for guider in self.guiders]
            for probe in probes:
                probe.begin("reference")
            reference_pred = self.predict(reference_latents, timestep, source_embeds)
            for probe in probes:
                probe.begin("source")
            with torch.enable_grad():
                # A clone, since a tensor made in inference mode by the caller can take part in no graph.
                leaf = latents.detach().clone().requires_grad_(True)
                pred = self.predict(leaf, timestep, source_embeds)
                state = GuidanceState(
                    latents=leaf,
                    reference_latents=reference_latents,
                    noise_pred=self._epsilon(pred, leaf, alpha_bar),
                    reference_noise_pred=self._epsilon(reference_pred, reference_latents, alpha_bar),
                    alpha_bar=alpha_bar,
                    timestep=torch.as_tensor(timestep),
                )
                energies = {}
                total = torch.zeros((), device=latents.device)
                for name, guider, probe in zip(self.names, self.guiders, probes, strict=True):
                    energy = self._checked(probe.energy(state), name, len(latents), timestep)
                    energies[name] = energy.detach()
                    # Samples are independent, so the gradient of the sum is each sample's own.
                    weight = torch.where(different, guider.scale, 0.0) if _zero_at_reference(guider) else guider.scale
                    total = total + (weight * energy.float()).sum()
                # Not `backward`, which would also fill the gradients of whatever parameters are being trained. Inside
                # the `with`, because under gradient checkpointing the processors run again now.
                (gradient,) = torch.autograd.grad(total, leaf)
        return _Gradient(gradient.float(), energies)

    def _epsilon(self, prediction: torch.Tensor, latents: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "v_prediction":
            return epsilon_from_v(prediction, latents, alpha_bar)
        return prediction

    @staticmethod
    def _checked(energy: Any, name: str, batch: int, timestep: torch.Tensor | int) -> torch.Tensor:
        if not isinstance(energy, torch.Tensor) or energy.shape != (batch,):
            found = tuple(energy.shape) if isinstance(energy, torch.Tensor) else type(energy).__name__
            raise ValueError(f"{name} returned {found}; an energy is one number per sample, here of shape ({batch},)")
        if not energy.requires_grad:
            raise ValueError(f"{name} does not depend on the latents, so it cannot guide; measure another layer")
        if not bool(torch.isfinite(energy).all()):
            raise ValueError(
                f"{name} is {energy.tolist()} at timestep {int(timestep)}, not finite; lower its scale or "
                "guidance_scale, or load the model in float32 if it runs in half precision"
            )
        return energy


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Takes `requires_grad` from all parameters for the time of a `with` block, and gives it back to those that had it.

    Args:
        network (`torch.nn.Module`): The network.
    """
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _differ(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Which samples have left the source picture, `(batch,)` of bool."""
    return sample_norm(latents.float() - reference.float()) > SAME_LATENTS * sample_norm(reference)


def _zero_at_reference(guider: GuidanceEnergy) -> bool:
    return getattr(guider, "zero_at_reference", True)


def _distinct_names(guiders: Sequence[GuidanceEnergy]) -> list[str]:
    names: list[str] = []
    for guider in guiders:
        kind = type(guider).__name__
        count = sum(name.split(" ")[0] == kind for name in names)
        names.append(kind if count == 0 else f"{kind} {count + 1}")
    return names
