"""Objectives: closed forms, the scale that makes learning rates comparable, layouts, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, QwenImagePipeline
from torch import nn

from diffusers_ext.steering import (
    Blur,
    ClassifierObjective,
    Compose,
    DecodedObjective,
    FunctionObjective,
    GaussianBlur,
    InpaintMask,
    LatentMaskObjective,
    LinearOperator,
    MeasurementObjective,
    MotionBlur,
    Objective,
    PackedObjective,
    SumObjective,
    SuperResolution,
    official_settings,
)
from diffusers_ext.steering.differentiable import polyak_step


OPERATORS: dict[str, LinearOperator] = {
    "mask": InpaintMask(torch.ones(8, 8).tril()),
    "average": SuperResolution(2),
    "bicubic": SuperResolution(4, "bicubic"),
    "blur": GaussianBlur(5, 1.0),
    "motion": MotionBlur(5, 30.0),
    "sharpening": Blur(torch.tensor([[0.0, -1.0, 0.0], [-1.0, 5.0, -1.0], [0.0, -1.0, 0.0]])),
    "both": Compose(GaussianBlur(3, 1.0), SuperResolution(2)),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)
SHAPE = (2, 3, 8, 8)


def noise(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(name: str, **settings: Any) -> MeasurementObjective:
    operator = OPERATORS[name]
    clean = operator.A(noise(1))
    return MeasurementObjective(operator, clean + 0.05 * noise(2, tuple(clean.shape)), **settings)


def matrix_of(operator: LinearOperator) -> torch.Tensor:
    size = math.prod(SHAPE[1:])
    return operator.A(torch.eye(size, dtype=torch.float64).reshape(size, *SHAPE[1:])).flatten(1).mT


# -- measurements ------------------------------------------------------------------------------------------------------


@every_operator
def test_the_gradient_is_that_of_the_loss(name: str) -> None:
    objective, clean = measured(name), noise().requires_grad_(True)
    (expected,) = torch.autograd.grad(objective.loss(clean).sum(), clean)
    torch.testing.assert_close(objective.grad(clean.detach()), expected)


@every_operator
def test_the_raw_gradient_is_that_of_the_authors_cost(name: str) -> None:
    objective, clean = measured(name, weight=7.0), noise().requires_grad_(True)
    cost = 7.0 * (objective.operator.A(clean) - objective.measurement).square().mean()
    assert float(objective.loss(clean).sum().detach()) == pytest.approx(float(cost.detach()))
    (expected,) = torch.autograd.grad(cost, clean)
    torch.testing.assert_close(objective.grad(clean.detach()), expected)


@every_operator
@pytest.mark.parametrize("rate", [0.1, 1.0, 1.9])
def test_every_learning_rate_below_two_lowers_the_loss(name: str, rate: float) -> None:
    objective, clean = measured(name), noise()
    for _ in range(20):
        following = clean - rate * objective.grad(clean)
        assert (objective.loss(following) <= objective.loss(clean) * (1 + 1e-9) + 1e-20).all()
        clean = following


@every_operator
def test_a_learning_rate_above_two_diverges_so_the_scale_is_sharp(name: str) -> None:
    objective, clean = measured(name), noise()
    before = objective.loss(clean)
    for _ in range(100):
        clean = clean - 2.1 * objective.grad(clean)
    assert (objective.loss(clean) > 10 * before).all()


@every_operator
def test_the_proximal_step_minimises_its_quadratic(name: str) -> None:
    objective, clean, variance = measured(name, noise_std=0.2), noise(), 0.3
    matrix = matrix_of(objective.operator)
    inner = matrix.mT @ matrix / 0.2**2 + torch.eye(matrix.shape[1], dtype=torch.float64) / variance
    right = objective.measurement.flatten(1) @ matrix / 0.2**2 + clean.flatten(1) / variance
    expected = torch.linalg.solve(inner, right.mT).mT.reshape(SHAPE)
    torch.testing.assert_close(objective.prox(clean, variance), expected, rtol=1e-5, atol=1e-6)


@every_operator
def test_the_projection_is_the_nearest_sample_that_has_the_measurement(name: str) -> None:
    operator = OPERATORS[name]
    objective, clean = MeasurementObjective(operator, operator.A(noise(1)), noise_std=0.0), noise()
    projected = objective.project(clean)
    torch.testing.assert_close(operator.A(projected), objective.measurement, rtol=0, atol=1e-6)
    matrix = matrix_of(operator)
    moved = (projected - clean).flatten(1)
    in_range = moved @ (torch.linalg.pinv(matrix) @ matrix).mT
    torch.testing.assert_close(moved, in_range, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(objective.prox(clean, 0.5), projected)


@every_operator
def test_batch_and_resolution_change_no_step(name: str) -> None:
    objective, clean = measured(name), noise()
    step = objective.grad(clean)
    alone = MeasurementObjective(objective.operator, objective.measurement[:1]).grad(clean[:1])
    torch.testing.assert_close(step[:1], alone)
    if name in ("mask", "blur"):  # the one has a size, the other's edges are not a repetition
        return
    operator = objective.operator
    wide = MeasurementObjective(operator, objective.measurement.repeat(1, 1, 2, 2))
    if name in ("average", "motion", "sharpening"):
        torch.testing.assert_close(wide.grad(clean.repeat(1, 1, 2, 2)), step.repeat(1, 1, 2, 2))


def test_one_measurement_serves_all_samples_and_half_precision_works() -> None:
    objective = MeasurementObjective(SuperResolution(2), noise(1, (1, 3, 4, 4)).half())
    assert objective.grad(noise().float()).shape == SHAPE and objective.loss(noise().half()).dtype == torch.float32


def test_the_floor_is_what_noise_leaves_of_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(400, 3, 8, 8, generator=generator)
    for operator in (SuperResolution(2), InpaintMask(torch.ones(8, 8).tril())):
        clean = operator.A(truth)
        added = (
            operator.A(torch.randn(clean.shape, generator=generator))
            if isinstance(operator, InpaintMask)
            else torch.randn(clean.shape, generator=generator)
        )
        objective = MeasurementObjective(operator, clean + 0.1 * added, noise_std=0.1)
        assert float(objective.loss(truth).mean()) == pytest.approx(objective.floor(truth), rel=0.02)


def test_a_latent_mask_keeps_the_reference_and_frees_the_rest() -> None:
    keep, reference = torch.ones(8, 8).tril(), noise(3)
    objective = LatentMaskObjective(keep, reference)
    clean = noise()
    torch.testing.assert_close(objective.grad(clean), keep * (clean - reference))
    torch.testing.assert_close(objective.prox(clean, 0.4), keep * reference + (1 - keep) * clean)
    assert torch.equal(objective.loss(keep * reference + 5 * (1 - keep)), torch.zeros(2, dtype=torch.float64))


# -- sums and layouts --------------------------------------------------------------------------------------------------


def test_a_sum_weighs_losses_and_gradients_and_stays_stable() -> None:
    parts = [measured("average"), LatentMaskObjective(torch.ones(8, 8).tril(), noise(3))]
    objective, clean = SumObjective(parts, weights=[3, 1]), noise()
    torch.testing.assert_close(objective.loss(clean), 0.75 * parts[0].loss(clean) + 0.25 * parts[1].loss(clean))
    torch.testing.assert_close(objective.grad(clean), 0.75 * parts[0].grad(clean) + 0.25 * parts[1].grad(clean))
    for _ in range(30):
        following = clean - 1.95 * objective.grad(clean)
        assert (objective.loss(following) <= objective.loss(clean) * (1 + 1e-9) + 1e-20).all()
        clean = following
    assert objective.prox is None and objective.project is None


def test_packing_is_that_of_flux_and_qwen_image() -> None:
    latents = noise(0, (2, 16, 8, 12)).float()
    objective = PackedObjective(LatentMaskObjective(torch.ones(8, 12), latents), height=8, width=12)
    packed = objective.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(packed, QwenImagePipeline._pack_latents(latents[:, None], 2, 16, 8, 12))
    assert torch.equal(objective.unpack(packed), latents)
    three = PackedObjective(LatentMaskObjective(torch.ones(6, 9), latents[:, :, :6, :9]), 6, 9, patch_size=3)
    assert torch.equal(three.unpack(three.pack(latents[:, :, :6, :9])), latents[:, :, :6, :9])


def test_a_packed_objective_says_the_same_of_tokens() -> None:
    inner = MeasurementObjective(SuperResolution(2), noise(1, (1, 3, 4, 4)), noise_std=0.2)
    objective, clean = PackedObjective(inner, 8, 8), noise()
    tokens = objective.pack(clean)
    assert tokens.shape == (2, 16, 12)
    torch.testing.assert_close(objective.loss(tokens), inner.loss(clean))
    for method, extra in (("grad", ()), ("prox", (0.4,)), ("project", ())):
        there = getattr(objective, method)(tokens, *extra)
        torch.testing.assert_close(objective.unpack(there), getattr(inner, method)(clean, *extra))
    function = PackedObjective(FunctionObjective(lambda pictures: pictures.square().mean((1, 2, 3))), 8, 8)
    assert function.prox is None and function.project is None and function.grad(tokens).shape == tokens.shape


# -- functions, classifiers, decoders ----------------------------------------------------------------------------------


def test_polyaks_step_reaches_the_floor_of_a_linear_loss() -> None:
    slope, clean = noise(1), noise()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (slope * x).flatten(1).sum(1) + 100

    objective = FunctionObjective(loss, floor=3.0, largest_step=1e6)
    torch.testing.assert_close(loss(clean - objective.grad(clean)), torch.full((2,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("rate", [0.1, 1.0, 1.9])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_polyaks_step_nears_every_minimum_whatever_the_units(rate: float, unit: float) -> None:
    target = noise(1)
    objective = FunctionObjective(lambda x: unit * (x - target).abs().flatten(1).sum(1), largest_step=1e6)
    clean = noise()
    for _ in range(30):
        following = clean - rate * objective.grad(clean)
        assert ((following - target).flatten(1).norm(dim=1) <= (clean - target).flatten(1).norm(dim=1) + 1e-9).all()
        clean = following


def test_a_step_is_bounded_and_ends_at_the_floor() -> None:
    flat = FunctionObjective(lambda x: 1.0 + 1e-9 * x.flatten(1).sum(1), largest_step=0.25)
    assert float(flat.grad(noise()).square().mean().sqrt()) == pytest.approx(0.25)
    satisfied = FunctionObjective(lambda x: x.square().flatten(1).mean(1), floor=100.0)
    assert float(satisfied.grad(noise()).abs().max()) == 0.0
    none = polyak_step(torch.ones(2), torch.zeros(2, 3), 0.0, 1.0)
    assert torch.equal(none, torch.zeros(2, 3))


def test_gradients_are_found_where_pipelines_forbid_them() -> None:
    objective = FunctionObjective(lambda x: x.square().flatten(1).mean(1))
    expected = objective.grad(noise())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(objective.grad(noise()), expected)


class Colour(nn.Module):
    """Logits of pictures: how red, green and blue they are."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return 4 * pictures.mean((2, 3))


@pytest.mark.parametrize("target", [2, torch.tensor([2, 0])], ids=str)
def test_a_classifier_is_convinced(target: Any) -> None:
    objective, clean = ClassifierObjective(Colour(), target, confidence=0.9), noise().float()
    for _ in range(30):
        clean = clean - objective.grad(clean)
    wanted = torch.as_tensor(target).expand(2)
    certain = Colour()(clean).softmax(1)[torch.arange(2), wanted]
    assert (certain > 0.89).all() and (certain < 0.95).all()


def tiny_vae() -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, layers_per_block=1, latent_channels=4,
            scaling_factor=1.5, shift_factor=0.1,
        ).eval()  # fmt: skip


def test_a_decoded_objective_lowers_the_loss_of_pictures() -> None:
    vae, latents = tiny_vae(), noise(0, (2, 4, 8, 8)).float()
    truth = vae.decode(noise(1, (2, 4, 8, 8)).float() / 1.5 + 0.1, return_dict=False)[0].detach()
    operator = SuperResolution(2)
    objective = DecodedObjective(vae, MeasurementObjective(operator, operator.A(truth), noise_std=0.01))
    torch.testing.assert_close(objective.decode(latents), vae.decode(latents / 1.5 + 0.1, return_dict=False)[0])
    before = objective.loss(latents)
    with torch.no_grad():
        for _ in range(40):
            latents = latents - objective.grad(latents)
    assert (objective.loss(latents) < 0.2 * before).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_changes_memory_and_not_the_gradient(dtype: torch.dtype) -> None:
    vae, latents = tiny_vae().to(dtype), noise(0, (1, 4, 8, 8)).float()
    inner = MeasurementObjective(SuperResolution(2), torch.zeros(1, 3, 8, 8))
    plain, saved = (DecodedObjective(vae, inner, checkpointing=value) for value in (False, True))
    sizes = []

    def gradient(objective: Objective) -> torch.Tensor:
        kept: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = objective.grad(latents)
        sizes.append(sum(kept))
        return found

    torch.testing.assert_close(gradient(plain), gradient(saved), rtol=1e-3, atol=1e-4)
    assert not vae.is_gradient_checkpointing and all(weight.requires_grad for weight in vae.parameters())
    assert all(weight.grad is None for weight in vae.parameters())


def test_the_autoencoder_is_as_before_after_an_error() -> None:
    vae = tiny_vae()
    objective = DecodedObjective(
        vae, MeasurementObjective(SuperResolution(3), torch.zeros(1, 3, 5, 5)), checkpointing=True
    )
    with pytest.raises(ValueError, match="factor=3 does not divide"):
        objective.grad(torch.zeros(1, 4, 8, 8))
    assert not vae.is_gradient_checkpointing and all(weight.requires_grad for weight in vae.parameters())


def test_latents_with_statistics_of_each_channel_are_decoded_with_them() -> None:
    class Statistics(nn.Module):
        dtype = torch.float32
        config = {"latents_mean": [1.0, 2.0, 3.0], "latents_std": [2.0, 3.0, 4.0]}

        def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (latents,)

    objective = DecodedObjective(Statistics(), MeasurementObjective(SuperResolution(2), torch.zeros(1, 3, 4, 4)))
    decoded = objective.decode(torch.ones(1, 3, 8, 8))
    assert decoded[0, :, 0, 0].tolist() == [3.0, 5.0, 7.0]
    assert objective.decode(torch.ones(1, 3, 2, 8, 8)).shape == (1, 3, 2, 8, 8)


# -- settings of the authors -------------------------------------------------------------------------------------------


def test_the_authors_settings_are_those_of_their_scripts() -> None:
    pixel, flux = official_settings("pixel"), official_settings("flux_edit")
    assert pixel.objective == {"weight": 1.0} and pixel.scheduler["learning_rate"] == 500.0
    assert pixel.num_inference_steps == 100 and pixel.scheduler["steer_stop"] == 0.99
    assert flux.scheduler["optimization_steps"] == 5 and flux.scheduler["data_step"] == "grad"
    # eta = 2 c lr / n: for one picture of 64 pixels, and for the latents of one of 1024
    assert 2 * 1.0 * 500 / (3 * 64 * 64) == pytest.approx(0.081, abs=1e-3)
    assert 2 * flux.objective["weight"] * flux.scheduler["learning_rate"] / (16 * 128 * 128) == pytest.approx(
        0.0046, abs=1e-4
    )
    assert official_settings("instaflow_inpaint").scheduler["optimizer"] == "adam"
    with pytest.raises(ValueError, match="task='flux' is not known; use one of pixel, instaflow_inpaint"):
        official_settings("flux")


# -- wrong calls -------------------------------------------------------------------------------------------------------

MASK = torch.ones(8, 8)
PICTURE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: MeasurementObjective(SuperResolution(2), PICTURE).grad(PICTURE), r"measurement of shape \(1, 3, 8, 8\) does not fit"),
    (lambda: MeasurementObjective(SuperResolution(2), torch.zeros(3, 3, 4, 4)).grad(PICTURE), r"measurement of shape \(3, 3, 4, 4\)"),
    (lambda: MeasurementObjective(SuperResolution(2), PICTURE * math.nan), "measurement is not finite"),
    (lambda: MeasurementObjective(SuperResolution(2), PICTURE, noise_std=-1.0), "noise_std=-1.0 is out of range"),
    (lambda: MeasurementObjective(SuperResolution(2), PICTURE, weight=0.0), "weight=0.0 is out of range"),
    (lambda: MeasurementObjective(InpaintMask(MASK), PICTURE).prox(PICTURE, 0.0), "variance=0.0 is out of range"),
    (lambda: LatentMaskObjective(torch.ones(4, 4), PICTURE), r"mask of shape \(4, 4\) does not fit pictures of shape"),
    (lambda: SumObjective([]), r"objectives=\[\] has none"),
    (lambda: SumObjective([LatentMaskObjective(MASK, PICTURE)], [1, 2]), r"weights=\[1, 2\] does not fit 1"),
    (lambda: SumObjective([LatentMaskObjective(MASK, PICTURE)], [0]), "weights=0 is out of range"),
    (lambda: PackedObjective(LatentMaskObjective(MASK, PICTURE), 7, 8), "height=7 is not a multiple of patch_size=2"),
    (lambda: PackedObjective(LatentMaskObjective(MASK, PICTURE), 8, 8, 0), "patch_size=0 is out of range"),
    (lambda: PackedObjective(LatentMaskObjective(MASK, PICTURE), 8, 8).loss(PICTURE), r"clean has shape \(1, 3, 8, 8\); height=8"),
    (lambda: FunctionObjective(len, floor=math.nan), "floor=nan is not a number"),
    (lambda: FunctionObjective(len, largest_step=0), "largest_step=0 is out of range"),
    (lambda: FunctionObjective(lambda x: x.mean()).grad(PICTURE), r"returned shape \(\); it must return one loss for each"),
    (lambda: FunctionObjective(lambda x: 5).loss(PICTURE), "returned int; it must return one loss"),
    (lambda: FunctionObjective(lambda x: torch.ones(1)).grad(PICTURE), "does not depend on the sample"),
    (lambda: ClassifierObjective(Colour(), 3).grad(PICTURE), r"target=3 does not fit logits of shape \(1, 3\)"),
    (lambda: ClassifierObjective(Colour(), 0, confidence=1.0), "confidence=1.0 is out of range"),
    (lambda: ClassifierObjective(lambda x: x, 0).grad(PICTURE), "classifier returned shape"),
    (lambda: DecodedObjective(lambda x: x, LatentMaskObjective(MASK, PICTURE), checkpointing=True), "checkpointing=True: function"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_value_and_cure(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: MeasurementObjective(MASK, PICTURE), "operator=Tensor is no LinearOperator"),
    (lambda: MeasurementObjective(SuperResolution(2), 5), "measurement is int"),
    (lambda: LatentMaskObjective(MASK, None), "reference is NoneType"),
    (lambda: SumObjective([len]), "objectives has builtin_function_or_method; give an objective"),
    (lambda: PackedObjective(None, 8, 8), "objective has NoneType"),
    (lambda: FunctionObjective(5), "function=5 cannot be called"),
    (lambda: ClassifierObjective(None, 1), "classifier=None cannot be called"),
    (lambda: ClassifierObjective(Colour(), "blue"), "target='blue' is no class"),
    (lambda: DecodedObjective(5, LatentMaskObjective(MASK, PICTURE)), "vae=int cannot decode"),
])  # fmt: skip
def test_what_is_of_another_kind_is_a_type_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_an_objective_that_lacks_its_methods_says_which() -> None:
    with pytest.raises(NotImplementedError, match="Objective must define loss"):
        Objective().loss(PICTURE)
    with pytest.raises(NotImplementedError, match="Objective must define grad"):
        Objective().grad(PICTURE)
