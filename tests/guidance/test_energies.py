"""Energies one by one: their value, what they may be given, and what they leave behind."""

import pytest
import torch
from torch import nn

from diffusers_ext.guidance import (
    FeatureEnergy,
    GuidanceEnergy,
    GuidanceState,
    SelfAttentionEnergy,
    find_layer,
    mean_absolute,
    mean_square,
)
from tests.helpers.tiny_models import TEXT_WIDTH, tiny_latents, tiny_unet


WORDS = torch.randn(2, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(3))


def state(latents: torch.Tensor, reference: torch.Tensor) -> GuidanceState:
    return GuidanceState(latents, reference, latents * 0.1, reference * 0.1, torch.tensor(0.36), torch.tensor(500))


def energy_of(energy: GuidanceEnergy, unet: nn.Module, latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), energy.attach(unet) as probe:
        for phase, z in (("reference", reference), ("source", latents)):
            probe.begin(phase)
            unet(z, 500, WORDS[: len(z)])
        return probe.energy(state(latents, reference))


def test_means_are_per_sample_and_in_float32():
    # 2e-4 squared is below the smallest float16.
    a, b = torch.full((2, 3, 4), 2e-4, dtype=torch.float16), torch.zeros(2, 3, 4, dtype=torch.float16)
    a[1] *= 2
    torch.testing.assert_close(mean_square(a, b), torch.tensor([4e-8, 1.6e-7]), rtol=1e-2, atol=0)
    torch.testing.assert_close(mean_absolute(a, b), torch.tensor([2e-4, 4e-4]), rtol=1e-2, atol=0)


def test_the_feature_energy_is_the_mean_difference_of_a_layer():
    unet, latents, reference = tiny_unet(), tiny_latents(2, 0), tiny_latents(2, 1)
    outputs = []
    handle = unet.conv_norm_out.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        for z in (reference, latents):
            unet(z, 500, WORDS)
    handle.remove()
    difference = outputs[1] - outputs[0]
    for loss, expected in (("l1", difference.abs()), ("l2", difference.square())):
        energy = energy_of(FeatureEnergy(layer="conv_norm_out", loss=loss), unet, latents, reference)
        torch.testing.assert_close(energy, expected.mean(dim=(1, 2, 3)))


def test_the_self_attention_energy_is_the_sum_over_layers():
    unet, latents, reference = tiny_unet(), tiny_latents(2, 0), tiny_latents(2, 1)
    blocks = ("down_blocks", "mid_block", "up_blocks")
    parts = [energy_of(SelfAttentionEnergy(layers=block), unet, latents, reference) for block in blocks]
    whole = energy_of(SelfAttentionEnergy(), unet, latents, reference)
    assert (whole > 0).all()
    torch.testing.assert_close(whole, sum(parts))


@pytest.mark.parametrize("energy", [SelfAttentionEnergy(), FeatureEnergy(), FeatureEnergy(loss="l2")], ids=repr)
def test_energies_of_equal_latents_are_exactly_zero(energy):
    unet, latents = tiny_unet(), tiny_latents(2)
    assert energy_of(energy, unet, latents, latents).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("energy", [SelfAttentionEnergy(), FeatureEnergy()], ids=repr)
def test_energies_do_not_depend_on_the_batch(energy):
    unet, latents, reference = tiny_unet(), tiny_latents(2, 0), tiny_latents(2, 1)
    both = energy_of(energy, unet, latents, reference)
    torch.testing.assert_close(energy_of(energy, unet, latents[:1], reference[:1]), both[:1], rtol=1e-4, atol=0)


def test_other_peoples_hooks_survive():
    unet, calls = tiny_unet(), []
    unet.up_blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(RuntimeError), FeatureEnergy().attach(unet):
        raise RuntimeError
    assert len(unet.up_blocks[-1]._forward_hooks) == 1
    energy_of(FeatureEnergy(), unet, tiny_latents(2), tiny_latents(2, 1))
    assert len(calls) == 2 and len(unet.up_blocks[-1]._forward_hooks) == 1


def test_a_layer_may_put_out_a_tuple():
    energy = energy_of(FeatureEnergy(layer="down_blocks.0"), tiny_unet(), tiny_latents(2), tiny_latents(2, 1))
    assert energy.shape == (2,) and (energy > 0).all()


def test_a_layer_that_does_not_run_is_named():
    with pytest.raises(ValueError, match="'up_blocks' of FeatureEnergy does not run"):
        energy_of(FeatureEnergy(layer="up_blocks"), tiny_unet(), tiny_latents(2), tiny_latents(2, 1))


def test_negative_numbers_count_layers_from_the_end():
    unet = tiny_unet()
    assert find_layer(unet, "up_blocks.-1") is unet.up_blocks[1]
    assert find_layer(unet, "up_blocks.-2.resnets.0.conv1") is unet.up_blocks[0].resnets[0].conv1


@pytest.mark.parametrize(
    "path, answer",
    [
        ("up_block.1", "UNet2DConditionModel has no part 'up_block' .did you mean 'up_blocks'"),
        ("up_blocks.-3", "up_blocks has no part '-3'; it has 0, 1"),
        ("conv_in.weight", "conv_in has no part 'weight'; it has no parts"),
    ],
)
def test_an_unknown_layer_is_answered_with_what_there_is(path, answer):
    with pytest.raises(ValueError, match=answer):
        find_layer(tiny_unet(), path)


@pytest.mark.parametrize(
    "make, answer",
    [
        (lambda: SelfAttentionEnergy(scale=float("nan")), "scale=nan of SelfAttentionEnergy"),
        (lambda: SelfAttentionEnergy(scale="3e5"), "scale='3e5'"),
        (lambda: SelfAttentionEnergy(layers=[]), "layers="),
        (lambda: SelfAttentionEnergy(layers=-3), "layers=-3"),
        (lambda: SelfAttentionEnergy(layers=[256, True]), "layers="),
        (lambda: SelfAttentionEnergy(max_attention_resolution=0), "max_attention_resolution=0"),
        (lambda: SelfAttentionEnergy(reduction="max"), "reduction='max' is not one of sum, mean"),
        (lambda: SelfAttentionEnergy(branch="reference"), "branch='reference' of SelfAttentionEnergy is not one of"),
        (lambda: FeatureEnergy(loss="l3"), "loss='l3' is not one of l1, l2"),
        (lambda: FeatureEnergy(layer=2), "layer=2"),
    ],
)
def test_wrong_arguments_are_refused(make, answer):
    with pytest.raises(ValueError, match=answer):
        make()


def test_the_clean_latents_undo_the_noise():
    z, reference = tiny_latents(2), tiny_latents(2, 1)
    found = state(z, reference)
    torch.testing.assert_close(found.clean_latents, (z - 0.8 * 0.1 * z) / 0.6)
    torch.testing.assert_close(found.reference_clean_latents, (reference - 0.8 * 0.1 * reference) / 0.6)
