"""One step against the authors' recorded ones, in both parametrisations, and what it does to the network."""

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
    join_conditions,
    text_condition,
)
from diffusers_ext.inversion import v_from_epsilon


ENERGIES = {"nonstyle": (3e5, 500.0), "nonstyle_weak": (3e3, 50.0)}


class PredictsV(UNet2DConditionModel):
    """The same network, asked for v."""

    alpha_bar: torch.Tensor

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (v_from_epsilon(super().forward(sample, *args, **kwargs)[0], sample, self.alpha_bar),)


@pytest.fixture(scope="module")
def unet(tiny_sd_path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_sd_path / "unet", dtype=torch.float32)


def guiders(name: str) -> list[GuidanceEnergy]:
    attention, features = ENERGIES[name]
    return [SelfAttentionEnergy(attention), FeatureEnergy(features)]


def recorded(golden: Any, name: str, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Arguments and results of a step as the authors' code took it, from its own latents."""
    file, shared = golden(f"editing/guide_and_rescale_{name}.npz"), golden("editing/guide_and_rescale_nonstyle.npz")
    negative, source, target = shared.tensor("context").split(1)
    inverted = shared.tensor("inv_latents")
    guided = step < 6
    arguments = {
        "latents": inverted[10] if step == 0 else file.tensor("latent_out")[step - 1],
        "timestep": int(file["timesteps"][step]),
        "alpha_bar": file.tensor("alphas_cumprod_at_timesteps")[step],
        "guidance_scale": 7.5,
        "negative": text_condition(negative),
        "target": text_condition(target),
        "source": text_condition(source) if guided else None,
        "reference_latents": inverted[10 - step] if guided else None,
    }
    names = ("noise_pred", "scale_other", "norm_other", "norm_cfg")
    return arguments, {key: file.tensor(key)[step] for key in names}


@pytest.mark.parametrize("name", ENERGIES)
def test_every_step_is_that_of_the_authors(unet, golden, name):
    step = GuidedStep(unet, guiders(name))
    for number in range(10):
        arguments, expected = recorded(golden, name, number)
        found = step(**arguments)
        assert (found.noise_pred - expected["noise_pred"]).abs().max() <= 1e-3, number
        assert (found.gamma is None) == bool(expected["scale_other"].isnan()), number
        if found.gamma is not None:
            for value, key in (
                (found.gamma, "scale_other"),
                (found.guidance_norm, "norm_other"),
                (found.classifier_free_norm, "norm_cfg"),
            ):
                assert abs(value.item() / expected[key].item() - 1) <= 1e-3, (number, key)


def test_the_scaled_gradient_lies_between_the_bounds(unet, golden):
    arguments, _ = recorded(golden, "nonstyle", 2)
    plain = GuidedStep(unet, [])(**arguments).noise_pred
    for low, high in ((0.33, 3.0), (1.5, 1.5), (0.0, 0.1)):
        found = GuidedStep(unet, guiders("nonstyle"), NormRescaler(low, high))(**arguments)
        ratio = (found.gamma * found.guidance_norm / found.classifier_free_norm).item()
        assert low - 1e-5 <= ratio <= high + 1e-5
        added = (found.noise_pred - plain).norm() / found.classifier_free_norm
        assert abs(added.item() - ratio) < 1e-4


@pytest.mark.parametrize("layer", ["up_blocks.-1", "up_blocks.1.resnets.1"])
def test_checkpointing_changes_nothing(unet, golden, layer):
    arguments, _ = recorded(golden, "nonstyle", 3)
    step = GuidedStep(unet, [SelfAttentionEnergy(), FeatureEnergy(layer=layer)])
    plain = step(**arguments)
    unet.enable_gradient_checkpointing()
    try:
        checkpointed = step(**arguments)
    finally:
        unet.disable_gradient_checkpointing()
    assert torch.equal(checkpointed.noise_pred, plain.noise_pred)
    assert torch.equal(checkpointed.gamma, plain.gamma)


def test_a_network_that_predicts_v_is_guided_the_same(unet, golden, tiny_sd_path):
    v_unet = PredictsV.from_pretrained(tiny_sd_path / "unet", dtype=torch.float32)
    for number in (1, 4, 8):
        arguments, _ = recorded(golden, "nonstyle", number)
        level = v_unet.alpha_bar = arguments["alpha_bar"]
        in_epsilon = GuidedStep(unet, guiders("nonstyle"))(**arguments)
        in_v = GuidedStep(v_unet, guiders("nonstyle"), prediction_type="v_prediction")(**arguments)
        expected = v_from_epsilon(in_epsilon.noise_pred, arguments["latents"], level)
        torch.testing.assert_close(in_v.noise_pred, expected, atol=1e-3, rtol=1e-4)
        if number < 6:
            torch.testing.assert_close(in_v.gamma, in_epsilon.gamma, rtol=1e-4, atol=0)
            torch.testing.assert_close(in_v.classifier_free_norm, in_epsilon.classifier_free_norm, rtol=1e-4, atol=0)


def test_the_gradient_is_that_of_finite_differences(unet, golden):
    arguments, _ = recorded(golden, "nonstyle", 2)
    step = GuidedStep(unet, [SelfAttentionEnergy(3e5)], NormRescaler(0, float("inf")))
    gradient = step(**arguments).noise_pred - GuidedStep(unet, [])(**arguments).noise_pred
    direction = gradient / gradient.norm()

    def energy(distance: float) -> float:
        moved = {**arguments, "latents": arguments["latents"] + distance * direction}
        return 3e5 * step(**moved).energies["SelfAttentionEnergy"].item()

    measured = (energy(1e-2) - energy(-1e-2)) / 2e-2
    assert abs(measured / gradient.norm().item() - 1) < 1e-2


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_nothing_is_added_where_edit_and_source_are_the_same(unet, golden, noise):
    arguments, _ = recorded(golden, "nonstyle", 0)
    start = {**arguments, "latents": arguments["latents"] + noise}
    found = GuidedStep(unet, guiders("nonstyle"))(**start)
    assert found.gamma is None and found.forward_passes == 2 and found.backward_passes == 0
    assert torch.equal(found.noise_pred, GuidedStep(unet, [])(**start).noise_pred)


@pytest.mark.parametrize("together", [1, 2, None])
def test_samples_of_a_batch_do_not_see_each_other(unet, golden, together):
    steps = [recorded(golden, name, 3)[0] for name in ENERGIES]
    still = {**steps[0], "latents": steps[0]["reference_latents"]}  # has not left the source
    samples = (*steps, still)
    both = {**steps[0]}
    for key in ("latents", "reference_latents"):
        both[key] = torch.cat([arguments[key] for arguments in samples])
    for key in ("negative", "target", "source"):
        both[key] = join_conditions([arguments[key] for arguments in samples])
    step = GuidedStep(unet, guiders("nonstyle"), samples_per_pass=together)
    found = step(**both)
    for i, arguments in enumerate(steps):
        alone = step(**arguments)
        if together == 1:
            assert torch.equal(found.noise_pred[i : i + 1], alone.noise_pred)
        torch.testing.assert_close(found.gamma[i : i + 1], alone.gamma, rtol=1e-3, atol=0)
        torch.testing.assert_close(found.noise_pred[i : i + 1], alone.noise_pred, atol=2e-3, rtol=0)
    assert found.gamma[2] == 1 and found.guidance_norm[2] == 0


def test_only_the_source_pass_builds_a_graph(unet, golden, monkeypatch):
    seen = []
    forward = UNet2DConditionModel.forward

    def watched(self, sample, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), len(sample)))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    found = GuidedStep(unet, guiders("nonstyle"))(**recorded(golden, "nonstyle", 2)[0])
    # Reference and source in the same batch shape, then the negative and the target prompt in one batch.
    assert seen == [(False, 1), (True, 1), (False, 2)]
    assert found.forward_passes == 4 and found.backward_passes == 1 and not found.noise_pred.requires_grad


def test_the_network_is_left_as_it_was(unet, golden):
    first, *others = unet.parameters()
    wanted = [parameter.requires_grad for parameter in others]
    for i, parameter in enumerate(others):
        parameter.requires_grad_(i % 2 == 0)
    before = dict(unet.attn_processors)
    with torch.no_grad():
        GuidedStep(unet, guiders("nonstyle"))(**recorded(golden, "nonstyle", 2)[0])
    assert [parameter.requires_grad for parameter in others] == [i % 2 == 0 for i in range(len(others))]
    assert all(parameter.grad is None for parameter in (first, *others))
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    for parameter, value in zip(others, wanted, strict=True):
        parameter.requires_grad_(value)


class Own(GuidanceEnergy):
    """An energy of a user's that returns what it is told to."""

    def __init__(self, value: Any, scale: float = 1.0) -> None:
        super().__init__(scale)
        self.value = value

    def measure(self, state: Any) -> Any:
        return self.value(state)


class PullToZero(GuidanceEnergy):
    """Half the squared norm of the latents: not zero where edit and source are the same."""

    zero_at_reference = False

    def measure(self, state: Any) -> torch.Tensor:
        return state.latents.square().flatten(1).sum(1) / 2


def test_an_energy_of_ones_own_guides(unet, golden):
    arguments = recorded(golden, "nonstyle", 0)[0]
    found = GuidedStep(unet, [PullToZero(0.1)], NormRescaler(0, float("inf")))(**arguments)
    plain = GuidedStep(unet, [])(**arguments)
    torch.testing.assert_close(found.noise_pred - plain.noise_pred, 0.1 * arguments["latents"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "value, answer",
    [
        (
            lambda state: state.latents.flatten(1).sum(1) * float("nan"),
            r"Own 2 is .nan. in step 2 \(timestep 700\), not finite",
        ),
        (lambda state: state.latents.sum(), r"Own 2 returned \(\); an energy is one number per sample"),
        (lambda state: 3.0, "Own 2 returned float"),
        (lambda state: state.reference_latents.flatten(1).sum(1), "Own 2 does not depend on the latents"),
    ],
)
def test_a_wrong_energy_is_named(unet, golden, value, answer):
    fine = Own(lambda state: state.latents.flatten(1).sum(1))
    with pytest.raises(ValueError, match=answer):
        GuidedStep(unet, [fine, Own(value)])(**recorded(golden, "nonstyle", 2)[0], step=2, num_steps=10)
