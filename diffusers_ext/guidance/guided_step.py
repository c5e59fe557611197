"""One step of Guide-and-Rescale: network passes in, one prediction out.

Guide-and-Rescale, 2024, arXiv 2409.01322. With z the edit, z* the source at the same noise level, y_s, y_t, 0 the source,
target and negative prompt, w the guidance scale:

    reference pass   eps(z*, y_s)            maps and features of the source
    source pass      eps(z, y_s)             maps and features of the edit, with gradient
    target pass      eps(z, y_t)             with gradient only if an energy looks at it (`branch="target"`)
    g        = d/dz sum_i scale_i E_i        the network frozen
    c        = w (eps(z, y_t) - eps(z, 0))   where nothing looks at the target pass, both in one batch and without a graph
    eps_hat  = eps(z, 0) + c + gamma g       gamma from `rescale.py`

A network that is distilled with its guidance scale has no negative pass. What the prompt does is then c = eps(z, y_t) -
eps(z, y_s), which costs nothing more, and eps_hat = eps(z, y_t) + gamma g.

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
from .conditions import Condition, join_conditions, part_of_condition
from .energies import BRANCHES, Branch, EnergyProbe, GuidanceEnergy, GuidanceState, weight_of
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
        forward_passes (`int`): Network evaluations, each sample and each prompt counted.
        backward_passes (`int`): Gradients through the network, counted in the same way.
    """

    noise_pred: torch.Tensor
    gamma: torch.Tensor | None = None
    guidance_norm: torch.Tensor | None = None
    classifier_free_norm: torch.Tensor | None = None
    energies: dict[str, torch.Tensor] = field(default_factory=dict)
    forward_passes: int = 0
    backward_passes: int = 0


@dataclass
class _Guider:
    """An energy that takes part in a step."""

    name: str
    energy: GuidanceEnergy
    weight: torch.Tensor  # per sample


@dataclass
class _Guidance:
    gradient: torch.Tensor
    energies: dict[str, torch.Tensor]
    predictions: dict[Branch, torch.Tensor]
    passes: int


class GuidedStep:
    """Computes the guided prediction of one sampling step. Holds settings only, so that it can be called in any order.

    Args:
        unet (`torch.nn.Module`): Called as `unet(latents, timestep, return_dict=False, **condition)`.
        guiders (list of [`GuidanceEnergy`]): The energies; with an empty list every step is a plain one.
        rescaler ([`NormRescaler`], *optional*): Gives gamma. Defaults to the authors' bounds for editing.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"` or `"v_prediction"`.
        unet_kwargs (`dict`, *optional*): Further arguments of every pass, such as `cross_attention_kwargs`.
        samples_per_pass (`int`, *optional*, defaults to 1):
            Pictures of a batch that go through the network together in a step with energies. Two batch sizes round
            differently, and guidance amplifies that from 1e-6 to 1e-2; with 1 a picture's edit is the same, bit for bit,
            whatever is edited beside it, and memory does not grow with the batch. None takes all at once.

    Example:
        ```python
        import torch
        from diffusers import UNet2DConditionModel
        from diffusers_ext.guidance import FeatureEnergy, GuidedStep, text_condition

        unet = UNet2DConditionModel(block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
                                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        negative, target, source = (text_condition(torch.randn(1, 7, 32)) for _ in range(3))
        output = GuidedStep(unet, [FeatureEnergy()])(
            torch.randn(1, 4, 8, 8), timestep=500, alpha_bar=torch.tensor(0.3), guidance_scale=7.5, negative=negative,
            target=target, source=source, reference_latents=torch.randn(1, 4, 8, 8),
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
        samples_per_pass: int | None = 1,
    ) -> None:
        self.unet = unet
        self.guiders = list(guiders)
        self.rescaler = NormRescaler() if rescaler is None else rescaler
        self.prediction_type = prediction_type
        self.unet_kwargs = dict(unet_kwargs or {})
        self.samples_per_pass = samples_per_pass
        self.names = _distinct_names(self.guiders)

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor | int, condition: Condition) -> torch.Tensor:
        """One pass of the network, its prediction as it is."""
        return self.unet(latents, timestep, return_dict=False, **condition, **self.unet_kwargs)[0]

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | int,
        alpha_bar: torch.Tensor,
        guidance_scale: float,
        negative: Condition | None,
        target: Condition,
        source: Condition | None = None,
        reference_latents: torch.Tensor | None = None,
        step: int = 0,
        num_steps: int = 1,
    ) -> GuidedStepOutput:
        """Computes the prediction for one step.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): The edit.
            timestep (`torch.Tensor` or `int`): Scalar, what the network is asked at.
            alpha_bar (`torch.Tensor`): Scalar, noise level of `latents`.
            guidance_scale (`float`): w. As everywhere in diffusers there is no classifier-free guidance at 1 and below.
            negative (`dict`, *optional*): Condition of the negative prompt. None for a network that is distilled with its
                guidance scale.
            target (`dict`): Condition of the wanted picture's prompt; see `conditions.py`.
            source (`dict`, *optional*): Condition of the source picture's prompt.
            reference_latents (`torch.Tensor`, *optional*): The source at this noise level. None makes the step plain.
            step (`int`, *optional*, defaults to 0): The step, for energies whose scale depends on it, and for messages.
            num_steps (`int`, *optional*, defaults to 1): Steps of the whole run.

        Returns:
            [`GuidedStepOutput`]: The prediction and what it was made of.

        Raises:
            ValueError: If an energy is not finite or does not depend on the latents.
        """
        together = (self.samples_per_pass if self.guiders else None) or len(latents)
        parts = []
        for first in range(0, len(latents), together):
            rows = slice(first, first + together)
            prompts = (part_of_condition(negative, rows) if negative else None, part_of_condition(target, rows))
            if not self.guiders or reference_latents is None or source is None:
                parts.append(self._plain(latents[rows], timestep, guidance_scale, *prompts))
                continue
            states = (latents[rows], reference_latents[rows], timestep, alpha_bar)
            conditions = (*prompts, part_of_condition(source, rows))
            parts.append(self._guided(*states, guidance_scale, *conditions, step, num_steps))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _plain(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | int,
        guidance_scale: float,
        negative: Condition | None,
        target: Condition,
    ) -> GuidedStepOutput:
        if negative is None or guidance_scale <= 1:
            return GuidedStepOutput(self.predict(latents, timestep, target), forward_passes=len(latents))
        away, towards = self._both(latents, timestep, negative, target)
        return GuidedStepOutput(away + guidance_scale * (towards - away), forward_passes=2 * len(latents))

    def _both(
        self, latents: torch.Tensor, timestep: torch.Tensor | int, negative: Condition, target: Condition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.predict(torch.cat([latents] * 2), timestep, join_conditions([negative, target]))
        away, towards = both.chunk(2)
        return away, towards

    def _guided(
        self,
        latents: torch.Tensor,
        reference_latents: torch.Tensor,
        timestep: torch.Tensor | int,
        alpha_bar: torch.Tensor,
        guidance_scale: float,
        negative: Condition | None,
        target: Condition,
        source: Condition,
        step: int,
        num_steps: int,
    ) -> GuidedStepOutput:
        acting = self._acting(latents, reference_latents, step, num_steps)
        if not acting:
            return self._plain(latents, timestep, guidance_scale, negative, target)
        conditions: dict[Branch, Condition] = {"source": source, "target": target}
        guidance = self._guidance(acting, latents, reference_latents, timestep, alpha_bar, conditions, step)
        passes = guidance.passes + 1
        towards = guidance.predictions.get("target")
        if negative is None:
            for branch in BRANCHES:
                if branch not in guidance.predictions:
                    guidance.predictions[branch] = self.predict(latents, timestep, conditions[branch])
                    passes += 1
            noise_pred = guidance.predictions["target"]
            difference = noise_pred.float() - guidance.predictions["source"].float()
        else:
            if towards is None:
                away, towards = self._both(latents, timestep, negative, target)
                passes += 2
            else:
                away = self.predict(latents, timestep, negative)
                passes += 1
            scale = max(guidance_scale, 1.0)
            noise_pred = away + scale * (towards - away)
            difference = scale * (towards.float() - away.float())

        per_epsilon = alpha_bar.float() ** 0.5 if self.prediction_type == "v_prediction" else torch.ones(())
        gamma, guidance_norm, classifier_free_norm = self.rescaler(guidance.gradient, per_epsilon * difference)
        added = gamma.view(-1, 1, 1, 1) * guidance.gradient / per_epsilon
        return GuidedStepOutput(
            noise_pred=noise_pred + added.to(noise_pred.dtype),
            gamma=gamma,
            guidance_norm=guidance_norm,
            classifier_free_norm=classifier_free_norm,
            energies=guidance.energies,
            forward_passes=passes * len(latents),
            backward_passes=guidance.passes * len(latents),
        )

    def _acting(
        self, latents: torch.Tensor, reference_latents: torch.Tensor, step: int, num_steps: int
    ) -> dict[Branch, list[_Guider]]:
        """The energies that have a weight in this step, by the pass they look at."""
        different = _differ(latents, reference_latents)
        acting: dict[Branch, list[_Guider]] = {}
        for name, energy in zip(self.names, self.guiders, strict=True):
            weight = torch.full(different.shape, weight_of(energy, step, num_steps), device=latents.device)
            if getattr(energy, "zero_at_reference", True):
                weight = torch.where(different, weight, 0.0)
            if bool(weight.any()):
                acting.setdefault(getattr(energy, "branch", "source"), []).append(_Guider(name, energy, weight))
        return acting

    def _guidance(
        self,
        acting: dict[Branch, list[_Guider]],
        latents: torch.Tensor,
        reference_latents: torch.Tensor,
        timestep: torch.Tensor | int,
        alpha_bar: torch.Tensor,
        conditions: dict[Branch, Condition],
        step: int,
    ) -> _Guidance:
        """Gradient of the weighted energies to the latents, float32, in epsilon space."""
        network = getattr(self.unet, "_orig_mod", self.unet)
        gradient, energies, predictions = torch.zeros_like(latents, dtype=torch.float32), {}, {}
        with ExitStack() as stack:
            stack.enter_context(frozen(network))
            probes: dict[str, EnergyProbe] = {
                guider.name: stack.enter_context(guider.energy.attach(network))
                for guiders in acting.values()
                for guider in guiders
            }
            for probe in probes.values():
                probe.begin("reference")
            reference_pred = self.predict(reference_latents, timestep, conditions["source"])
            # One branch after the other, so that there is never more than one graph, and each branch's backward pass
            # (in which processors run again under gradient checkpointing) follows its forward pass.
            for branch in BRANCHES:
                if branch not in acting:
                    continue
                for probe in probes.values():
                    probe.begin(branch)
                with torch.enable_grad():
                    # A clone, since a tensor made in inference mode by the caller can take part in no graph.
                    leaf = latents.detach().clone().requires_grad_(True)
                    pred = self.predict(leaf, timestep, conditions[branch])
                    state = GuidanceState(
                        latents=leaf,
                        reference_latents=reference_latents,
                        noise_pred=self._epsilon(pred, leaf, alpha_bar),
                        reference_noise_pred=self._epsilon(reference_pred, reference_latents, alpha_bar),
                        alpha_bar=alpha_bar,
                        timestep=torch.as_tensor(timestep),
                    )
                    total = torch.zeros((), device=latents.device)
                    for guider in acting[branch]:
                        energy = probes[guider.name].energy(state)
                        self._check(energy, guider.name, len(latents), timestep, step)
                        energies[guider.name] = energy.detach()
                        # Samples are independent, so the gradient of the sum is each sample's own.
                        total = total + (guider.weight * energy.float()).sum()
                    # Not `backward`, which would also fill the gradients of whatever parameters are being trained.
                    (part,) = torch.autograd.grad(total, leaf)
                gradient += part.float()
                predictions[branch] = pred.detach()
        return _Guidance(gradient, energies, predictions, len(acting))

    def _epsilon(self, prediction: torch.Tensor, latents: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "v_prediction":
            return epsilon_from_v(prediction, latents, alpha_bar)
        return prediction

    @staticmethod
    def _check(energy: Any, name: str, batch: int, timestep: torch.Tensor | int, step: int) -> None:
        if not isinstance(energy, torch.Tensor) or energy.shape != (batch,):
            found = tuple(energy.shape) if isinstance(energy, torch.Tensor) else type(energy).__name__
            raise ValueError(f"{name} returned {found}; an energy is one number per sample, here of shape ({batch},)")
        if not energy.requires_grad:
            raise ValueError(f"{name} does not depend on the latents, so it cannot guide; measure another layer")
        if not bool(torch.isfinite(energy).all()):
            raise ValueError(
                f"{name} is {energy.tolist()} in step {step} (timestep {int(timestep)}), not finite; lower its scale or "
                "guidance_scale, or load the model in float32 if it runs in half precision"
            )


def _joined(parts: Sequence[GuidedStepOutput]) -> GuidedStepOutput:
    """The output of a batch from those of its parts; parts in which nothing guided have gamma 1 and norms 0."""
    sizes = [len(part.noise_pred) for part in parts]
    device = parts[0].noise_pred.device
    joined: dict[str, Any] = {}
    for name, empty in (("gamma", 1.0), ("guidance_norm", 0.0), ("classifier_free_norm", 0.0)):
        found = [getattr(part, name) for part in parts]
        filled = [
            torch.full((size,), empty, device=device) if value is None else value
            for value, size in zip(found, sizes, strict=True)
        ]
        joined[name] = None if all(value is None for value in found) else torch.cat(filled)
    names = list(dict.fromkeys(name for part in parts for name in part.energies))
    zeros = [torch.zeros(size, device=device) for size in sizes]
    return GuidedStepOutput(
        noise_pred=torch.cat([part.noise_pred for part in parts]),
        energies={
            name: torch.cat([part.energies.get(name, zero) for part, zero in zip(parts, zeros, strict=True)])
            for name in names
        },
        forward_passes=sum(part.forward_passes for part in parts),
        backward_passes=sum(part.backward_passes for part in parts),
        **joined,
    )


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


def _distinct_names(guiders: Sequence[GuidanceEnergy]) -> list[str]:
    names: list[str] = []
    for guider in guiders:
        kind = type(guider).__name__
        count = sum(name.split(" ")[0] == kind for name in names)
        names.append(kind if count == 0 else f"{kind} {count + 1}")
    return names
