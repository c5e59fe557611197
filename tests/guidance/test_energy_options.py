"""What the options of the energies do to a guided step: branches, weights by step, layers by tokens."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_ext.guidance import (
    FeatureEnergy,
    GuidanceEnergy,
    GuidedStep,
    NormRescaler,
    SelfAttentionEnergy,
    text_condition,
)


@pytest.fixture(scope="module")
def unet(tiny_sd_path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_sd_path / "unet", dtype=torch.float32)


@pytest.fixture(scope="module")
def arguments(golden) -> dict[str, Any]:
    """A guided step in the middle of a recorded edit; the latents have 16 x 16, so layers have 256 and 64 tokens."""
    file = golden("editing/guide_and_rescale_nonstyle.npz")
    negative, source, target = file.tensor("context").split(1)
    return {
        "latents": file.tensor("latent_out")[2], "timestep": int(file["timesteps"][3]),
        "alpha_bar": file.tensor("alphas_cumprod_at_timesteps")[3], "guidance_scale": 7.5,
        "negative": text_condition(negative), "target": text_condition(target), "source": text_condition(source),
        "reference_latents": file.tensor("inv_latents")[7], "step": 3, "num_steps": 10,
    }  # fmt: skip


UNBOUNDED = NormRescaler(0, float("inf"))


def energy_of(unet: Any, arguments: dict[str, Any], guider: GuidanceEnergy) -> float:
    (value,) = GuidedStep(unet, [guider])(**arguments).energies.values()
    return value.item()


def test_layers_by_tokens_are_those_by_name(unet, arguments):
    by_tokens = energy_of(unet, arguments, SelfAttentionEnergy(layers=64))
    names = ["down_blocks.1", "mid_block", "up_blocks.0"]
    assert by_tokens == energy_of(unet, arguments, SelfAttentionEnergy(layers=names)) > 0
    every = energy_of(unet, arguments, SelfAttentionEnergy())
    assert energy_of(unet, arguments, SelfAttentionEnergy(layers=[64, 256])) == every > by_tokens
    assert energy_of(unet, arguments, SelfAttentionEnergy(layers=[256, *names])) == every


def test_the_resolution_of_the_layers_can_be_bounded(unet, arguments):
    small = energy_of(unet, arguments, SelfAttentionEnergy(max_attention_resolution=8))
    assert small == energy_of(unet, arguments, SelfAttentionEnergy(layers=64))
    assert energy_of(unet, arguments, SelfAttentionEnergy(max_attention_resolution=16)) > small


@pytest.mark.parametrize("options", [{"layers": 100}, {"max_attention_resolution": 7}])
def test_no_layer_left_is_answered_with_the_numbers_of_tokens(unet, arguments, options):
    with pytest.raises(ValueError, match="leaves SelfAttentionEnergy no layer.*have 64, 256 tokens"):
        GuidedStep(unet, [SelfAttentionEnergy(**options)])(**arguments)


def test_the_mean_over_layers_is_the_sum_divided_by_their_number(unet, arguments):
    total = energy_of(unet, arguments, SelfAttentionEnergy())
    mean = energy_of(unet, arguments, SelfAttentionEnergy(reduction="mean"))
    assert mean == pytest.approx(total / 11, rel=1e-5)  # the test model has 11 self-attention layers


def test_the_absolute_difference_bounds_the_square(unet, arguments):
    """Probabilities differ by less than 1, so their mean square is below their mean absolute difference."""
    square, absolute = (energy_of(unet, arguments, SelfAttentionEnergy(loss=loss)) for loss in ("l2", "l1"))
    assert 0 < square < absolute


def test_a_weight_may_depend_on_the_step(unet, arguments):
    calls = []

    def falling(step: int, num_steps: int) -> float:
        calls.append((step, num_steps))
        return 500.0 * (1 - step / num_steps)

    by_step = GuidedStep(unet, [FeatureEnergy(falling)], UNBOUNDED)(**arguments)
    constant = GuidedStep(unet, [FeatureEnergy(350.0)], UNBOUNDED)(**arguments)
    assert calls == [(3, 10)]
    assert torch.equal(by_step.noise_pred, constant.noise_pred)


def test_a_weight_of_zero_costs_nothing(unet, arguments):
    off = GuidedStep(unet, [SelfAttentionEnergy(0.0), FeatureEnergy(lambda step, n: float(step > 3))])(**arguments)
    assert (off.forward_passes, off.backward_passes, off.gamma) == (2, 0, None)
    assert torch.equal(off.noise_pred, GuidedStep(unet, [])(**arguments).noise_pred)


@pytest.mark.parametrize("value", [float("nan"), None, "1", True])
def test_a_weight_that_is_no_number_is_named_with_its_step(unet, arguments, value):
    with pytest.raises(ValueError, match=r"scale=.* of FeatureEnergy in step 3 is not a finite number"):
        GuidedStep(unet, [FeatureEnergy(lambda step, num_steps: value)])(**arguments)


def test_branches_run_one_after_the_other_with_a_graph_each(unet, arguments, monkeypatch):
    seen = []
    forward = UNet2DConditionModel.forward

    def watched(self, sample, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), len(sample)))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    both = GuidedStep(unet, [SelfAttentionEnergy(), FeatureEnergy(branch="target")])(**arguments)
    # Reference, source, target, negative: all in the same batch shape, since the first three are compared.
    assert seen == [(False, 1), (True, 1), (True, 1), (False, 1)]
    assert (both.forward_passes, both.backward_passes) == (4, 2)
    seen.clear()
    target_only = GuidedStep(unet, [FeatureEnergy(branch="target")])(**arguments)
    assert seen == [(False, 1), (True, 1), (False, 1)]
    assert (target_only.forward_passes, target_only.backward_passes) == (3, 1)


def test_the_gradients_of_branches_add_up(unet, arguments):
    plain = GuidedStep(unet, [])(**arguments).noise_pred
    source, target = SelfAttentionEnergy(3e3), FeatureEnergy(50.0, branch="target")
    parts = [GuidedStep(unet, [guider], UNBOUNDED)(**arguments).noise_pred - plain for guider in (source, target)]
    both = GuidedStep(unet, [source, target], UNBOUNDED)(**arguments).noise_pred - plain
    torch.testing.assert_close(both, parts[0] + parts[1], atol=1e-4, rtol=1e-4)


def test_the_target_branch_guides_also_where_edit_and_source_are_the_same(unet, arguments):
    still = {**arguments, "latents": arguments["reference_latents"]}
    assert GuidedStep(unet, [SelfAttentionEnergy(), FeatureEnergy()])(**still).gamma is None
    styled = GuidedStep(unet, [SelfAttentionEnergy(), FeatureEnergy(branch="target")])(**still)
    assert list(styled.energies) == ["FeatureEnergy"] and styled.guidance_norm.item() > 0


def test_a_distilled_network_is_guided_by_what_the_prompts_differ_in(unet, arguments):
    """Without a negative prompt the ratio is taken to eps(z, target) - eps(z, source), at no pass more."""
    distilled = {**arguments, "negative": None}
    found = GuidedStep(unet, [FeatureEnergy()], NormRescaler(1.5, 1.5))(**distilled)
    latents, timestep = arguments["latents"], arguments["timestep"]
    with torch.no_grad():
        target, source = (
            unet(latents, timestep, return_dict=False, **arguments[name])[0] for name in ("target", "source")
        )
    difference = (target - source).norm()
    assert found.classifier_free_norm.item() == pytest.approx(difference.item(), rel=1e-5)
    assert (found.noise_pred - target).norm().item() == pytest.approx(1.5 * difference.item(), rel=1e-4)
    assert (found.forward_passes, found.backward_passes) == (3, 1)
    plain = GuidedStep(unet, [])(**{**distilled, "source": None})
    assert torch.equal(plain.noise_pred, target) and plain.forward_passes == 1
