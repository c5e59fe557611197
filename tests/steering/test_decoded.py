"""Objectives through a real autoencoder: the gradient, checkpoints, memory, and the round trip."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_ext.steering import (
    DecodedObjective,
    FunctionObjective,
    GaussianBlur,
    InpaintMask,
    LinearOperator,
    MeasurementObjective,
    PackedObjective,
    SuperResolution,
)
from tests.helpers.tiny_flows import shifted_vae


OPERATORS: dict[str, LinearOperator] = {
    "mask": InpaintMask(torch.ones(16, 16).tril()),
    "average": SuperResolution(4),
    "blur": GaussianBlur(5, 1.0),
}


def vae(dtype: torch.dtype = torch.float64) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shifted_vae().to(dtype)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def objective(name: str, network: Any, **settings: Any) -> DecodedObjective:
    operator = OPERATORS[name]
    measured = operator.A(0.5 * noise(1, 3, 16, 16, seed=1))
    return DecodedObjective(
        network, MeasurementObjective(operator, measured.to(torch.float64), noise_std=0.0), **settings
    )


class InDouble(DecodedObjective):
    """Its decoded pictures stay float64, so that differences of them mean something."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        return self.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_gradient_through_the_decoder_is_that_of_finite_differences(name: str) -> None:
    wanted = objective(name, vae())
    exact = InDouble(wanted.vae, wanted.objective, largest_step=1e9)
    latents = noise(2, 4, 8, 8, seed=2)
    step, losses = exact.grad(latents), exact.loss(latents)
    # Polyak's step of a loss with floor 0 is loss / |g|^2 g, so that g is step loss / |step|^2.
    size = step.flatten(1).square().sum(1)
    gradient = step * (losses / size).reshape(-1, 1, 1, 1)
    for seed in range(3, 6):
        direction = noise(2, 4, 8, 8, seed=seed)
        width = 1e-5
        ahead, behind = exact.loss(latents + width * direction), exact.loss(latents - width * direction)
        slope = (gradient * direction).flatten(1).sum(1)
        torch.testing.assert_close((ahead - behind) / (2 * width), slope, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", OPERATORS)
def test_float32_agrees_with_float64(name: str) -> None:
    latents = noise(1, 4, 8, 8, seed=2)
    narrow, wide = objective(name, vae(torch.float32)), objective(name, vae())
    exact = InDouble(wide.vae, wide.objective)
    torch.testing.assert_close(narrow.grad(latents.float()).double(), exact.grad(latents), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_checkpoints_change_nothing_but_memory(name: str) -> None:
    network, latents = vae(torch.float32), noise(1, 4, 8, 8, dtype=torch.float32)
    plain, checked = (objective(name, network, checkpointing=value) for value in (False, True))
    torch.testing.assert_close(checked.grad(latents), plain.grad(latents), rtol=1e-5, atol=1e-7)
    assert not network.is_gradient_checkpointing
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())


def saved_for_backward(wanted: DecodedObjective, latents: torch.Tensor) -> int:
    """Values that autograd keeps between the forward and the backward pass."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        wanted.grad(latents)
    return kept


def test_checkpoints_keep_fewer_activations() -> None:
    network, latents = vae(torch.float32), noise(1, 4, 8, 8, dtype=torch.float32)
    whole, parts = (
        saved_for_backward(objective("average", network, checkpointing=value), latents) for value in (False, True)
    )
    assert parts < whole


def test_encoding_and_decoding_undo_each_others_shift_and_scale() -> None:
    network = vae(torch.float32)
    wanted, pictures = objective("average", network), noise(1, 3, 16, 16, dtype=torch.float32).tanh()
    with torch.no_grad():
        latents = wanted.encode(pictures)
        raw = network.encode(pictures).latent_dist.mode()
        torch.testing.assert_close(latents, (raw - 0.1) * 1.5)
        torch.testing.assert_close(wanted.decode(latents), network.decode(raw).sample)


def test_means_and_deviations_of_channels_are_undone_too() -> None:
    network = vae(torch.float32)
    network.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    wanted, pictures = objective("average", network), noise(1, 3, 16, 16, dtype=torch.float32).tanh()
    with torch.no_grad():
        raw = network.encode(pictures).latent_dist.mode()
        torch.testing.assert_close(wanted.decode(wanted.encode(pictures)), network.decode(raw).sample)


def test_the_loss_falls_along_the_step_and_packing_changes_nothing() -> None:
    wanted, latents = objective("average", vae(torch.float32)), noise(1, 4, 8, 8, dtype=torch.float32)
    packed = PackedObjective(wanted, 8, 8)
    for _ in range(20):
        torch.testing.assert_close(packed.grad(packed.pack(latents)), packed.pack(wanted.grad(latents)))
        before, latents = wanted.loss(latents), latents - wanted.grad(latents)
    assert float(wanted.loss(latents).detach()) < 0.5 * float(
        objective("average", wanted.vae).loss(noise(1, 4, 8, 8).float()).detach()
    )
    assert float(wanted.loss(latents).detach()) <= float(before.detach())


def test_a_function_as_decoder_has_no_start_and_cannot_encode() -> None:
    wanted = DecodedObjective(
        lambda latents: latents, MeasurementObjective(SuperResolution(2), torch.zeros(1, 3, 4, 4))
    )
    assert getattr(wanted, "start", None) is None
    with pytest.raises(TypeError, match="vae=function cannot encode"):
        wanted.encode(torch.zeros(1, 3, 8, 8))
    assert getattr(DecodedObjective(vae(), FunctionObjective(lambda x: x.flatten(1).mean(1))), "start", None) is None
