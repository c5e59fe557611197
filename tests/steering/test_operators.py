"""Every operator against its explicit matrix: adjoint, norm, pseudo-inverse, regularised inverse, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from diffusers_ext.steering import (
    Blur,
    Compose,
    FromDeepinv,
    GaussianBlur,
    InpaintMask,
    LinearOperator,
    MotionBlur,
    SuperResolution,
)
from diffusers_ext.steering.operators import conjugate_gradients


class Physics:
    """Every third row of a picture blurred along its columns, with the methods of deepinv's linear physics."""

    kernel = torch.tensor([0.25, 0.5, 0.25])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.A(x) + torch.randn(self.A(x).shape)

    def blur(self, x: torch.Tensor) -> torch.Tensor:
        return 0.25 * x.roll(1, -1) + 0.5 * x + 0.25 * x.roll(-1, -1)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return self.blur(x)[..., ::3, :]

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(*y.shape[:-2], 3 * y.shape[-2], y.shape[-1], dtype=y.dtype)
        rows[..., ::3, :] = y
        return self.blur(rows)


class PhysicsWithInverse(Physics):
    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.fft(y, dim=-1) / self.response(y.shape[-1])
        rows = torch.zeros(*y.shape[:-2], 3 * y.shape[-2], y.shape[-1], dtype=y.dtype)
        rows[..., ::3, :] = torch.fft.ifft(spectrum, dim=-1).real
        return rows

    def response(self, size: int) -> torch.Tensor:
        return 0.5 + 0.5 * torch.cos(2 * math.pi * torch.arange(size, dtype=torch.float64) / size)


def holes(height: int, width: int) -> torch.Tensor:
    return (torch.rand(height, width, generator=torch.Generator().manual_seed(3)) > 0.4).float()


# name -> operator, size of pictures that it is tested on: even, odd and not square
OPERATORS: dict[str, tuple[LinearOperator, tuple[int, int]]] = {
    "mask": (InpaintMask(holes(7, 10)), (7, 10)),
    "soft mask": (InpaintMask(torch.rand(1, 9, 8, generator=torch.Generator().manual_seed(4))), (9, 8)),
    "average 2": (SuperResolution(2), (8, 10)),
    "average 3": (SuperResolution(3), (9, 15)),
    "bicubic 2": (SuperResolution(2, "bicubic"), (8, 6)),
    "bicubic 3": (SuperResolution(3, "bicubic"), (15, 9)),
    "gauss reflect": (GaussianBlur(5, 1.0), (8, 11)),
    "gauss replicate": (GaussianBlur(3, 0.8, "replicate"), (7, 7)),
    "gauss circular": (GaussianBlur(11, 1.5, "circular"), (8, 9)),
    "gauss zeros": (GaussianBlur(5, 2.0, "zeros"), (9, 6)),
    "motion": (MotionBlur(5, 30.0), (9, 8)),
    "motion, even": (MotionBlur(4, -70.0), (8, 9)),
    "any kernel": (Blur(torch.randn(3, 5, generator=torch.Generator().manual_seed(5))), (7, 8)),
    "wide kernel": (Blur(torch.rand(9, 9, generator=torch.Generator().manual_seed(7))), (5, 6)),
    "blur, smaller": (Compose(GaussianBlur(5, 1.0), SuperResolution(2)), (8, 10)),
    "motion, holes": (Compose(MotionBlur(3), InpaintMask(holes(7, 9))), (7, 9)),
    "deepinv": (FromDeepinv(Physics()), (6, 7)),
    "deepinv with inverse": (FromDeepinv(PhysicsWithInverse()), (6, 7)),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)
CHANNELS = 2


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def explicit(operator: LinearOperator, size: tuple[int, int]) -> torch.Tensor:
    """The matrix of an operator, column by column."""
    count = CHANNELS * size[0] * size[1]
    basis = torch.eye(count, dtype=torch.float64).reshape(count, CHANNELS, *size)
    return operator.A(basis).flatten(1).mT


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_adjoint_is_the_adjoint(name: str, dtype: torch.dtype) -> None:
    operator, size = OPERATORS[name]
    pictures = noise(3, CHANNELS, *size, dtype=dtype)
    image = operator.A(pictures)
    assert image.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    measurement = noise(*image.shape, seed=1, dtype=dtype)
    back = operator.adjoint(measurement)
    assert back.shape == pictures.shape
    left = (image.double() * measurement.double()).sum()
    right = (pictures.double() * back.double()).sum()
    scale = image.double().norm() * measurement.double().norm()
    assert abs(left - right) < (1e-12 if dtype == torch.float64 else 1e-6) * scale


@every_operator
def test_the_norm_is_the_largest_singular_value(name: str) -> None:
    operator, size = OPERATORS[name]
    expected = float(torch.linalg.svdvals(explicit(operator, size))[0])
    assert operator.norm(noise(1, CHANNELS, *size)) == pytest.approx(expected, rel=1e-4)
    assert operator.norm(noise(1, CHANNELS, *size).half()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("operator", [
    InpaintMask(holes(8, 8)), SuperResolution(2), SuperResolution(4, "bicubic"), GaussianBlur(5, 1.0),
    GaussianBlur(5, 1.0, "zeros"), MotionBlur(5, 45.0), Compose(GaussianBlur(3, 1.0), SuperResolution(2)),
], ids=repr)  # fmt: skip
def test_on_eight_by_eight_pixels_the_norm_in_closed_form_is_exact(operator: LinearOperator) -> None:
    values = torch.linalg.svdvals(explicit(operator, (8, 8)))
    assert operator.norm(torch.zeros(1, 2, 8, 8, dtype=torch.float64)) == pytest.approx(float(values[0]), rel=1e-10)


@every_operator
def test_the_pseudo_inverse_is_that_of_the_matrix(name: str) -> None:
    operator, size = OPERATORS[name]
    matrix = explicit(operator, size)
    measurement = operator.A(noise(3, CHANNELS, *size)) + 0.1 * noise(
        *operator.A(noise(3, CHANNELS, *size)).shape, seed=2
    )
    found = operator.pinv(measurement)
    if name == "deepinv":  # iterated, on a blur that loses a frequency
        found, measurement = operator.A(found), operator.A(operator.pinv(operator.A(found)))
        torch.testing.assert_close(found, measurement, rtol=1e-6, atol=1e-8)
        return
    expected = (measurement.flatten(1) @ torch.linalg.pinv(matrix, rtol=1e-10).mT).reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_measuring_the_pseudo_inverse_of_a_measurement_gives_it_again(name: str, dtype: torch.dtype) -> None:
    operator, size = OPERATORS[name]
    measurement = operator.A(noise(2, CHANNELS, *size, dtype=dtype))
    again = operator.A(operator.pinv(measurement))
    torch.testing.assert_close(again, measurement, rtol=0, atol=1e-7 if dtype == torch.float64 else 5e-5)


@every_operator
def test_the_regularised_inverse_is_that_of_the_matrix(name: str) -> None:
    operator, size = OPERATORS[name]
    matrix = explicit(operator, size)
    measurement = noise(*operator.A(noise(3, CHANNELS, *size)).shape, seed=2)
    for gain, shift in ((0.7, 0.03), (1e-3, 2.5e-3), (1.0, 1e-4)):
        inner = gain * matrix @ matrix.mT + shift * torch.eye(len(matrix), dtype=torch.float64)
        expected = torch.linalg.solve(inner, measurement.flatten(1).mT).mT.reshape(measurement.shape)
        found = operator.solve(measurement, gain, shift)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@every_operator
def test_pictures_of_a_batch_do_not_meet_and_autograd_passes(name: str) -> None:
    operator, size = OPERATORS[name]
    pictures = noise(3, CHANNELS, *size)
    for method in (
        operator.A,
        lambda x: operator.pinv(operator.A(x)),
        lambda x: operator.solve(operator.A(x), 1, 0.1),
    ):
        torch.testing.assert_close(method(pictures)[1:2], method(pictures[1:2]), rtol=1e-6, atol=1e-8)
    leaf = pictures.clone().requires_grad_(True)
    (0.5 * operator.A(leaf).square().sum()).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, operator.adjoint(operator.A(pictures)))


@every_operator
def test_the_same_picture_is_measured_the_same_twice(name: str) -> None:
    operator, size = OPERATORS[name]
    pictures = noise(1, CHANNELS, *size)
    assert torch.equal(operator.A(pictures), operator.A(pictures))
    assert name.split()[0] in repr(operator).lower() or repr(operator)


def test_averaging_is_average_pooling() -> None:
    pictures = noise(2, 3, 12, 18)
    torch.testing.assert_close(SuperResolution(3).A(pictures), functional.avg_pool2d(pictures, 3))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_that_of_picture_editors(factor: int) -> None:
    pictures = noise(2, 3, 24, 36)
    expected = functional.interpolate(pictures, scale_factor=1 / factor, mode="bicubic", antialias=True)
    torch.testing.assert_close(SuperResolution(factor, "bicubic").A(pictures), expected)


@pytest.mark.parametrize("padding", ["reflect", "replicate", "circular", "zeros"])
def test_a_gaussian_blur_is_a_convolution(padding: str) -> None:
    pictures, blur = noise(2, 3, 12, 18), GaussianBlur(5, 1.0, padding)
    offsets = torch.arange(-2, 3, dtype=torch.float64)
    line = torch.exp(-offsets.square() / 2) / torch.exp(-offsets.square() / 2).sum()
    kernel = torch.outer(line, line).expand(3, 1, 5, 5)
    padded = functional.pad(pictures, (2, 2, 2, 2), mode="constant" if padding == "zeros" else padding)
    torch.testing.assert_close(blur.A(pictures), functional.conv2d(padded, kernel, groups=3))


def test_the_picture_of_a_point_of_light_is_the_kernel() -> None:
    kernel = noise(3, 5, seed=8)
    point = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    point[..., 4, 4] = 1
    torch.testing.assert_close(Blur(kernel).A(point)[0, 0, 3:6, 2:7], kernel)
    at_the_edge = Blur(kernel).A(point.roll((-4, -4), (2, 3)))
    torch.testing.assert_close(at_the_edge, Blur(kernel).A(point).roll((-4, -4), (2, 3)))


def test_a_border_left_out_makes_a_blur_that_sees_nothing_beyond_the_edges() -> None:
    inner = torch.zeros(9, 9)
    inner[1:-1, 2:-2] = 1
    kernel, pictures = noise(3, 5, seed=8), noise(1, 2, 9, 9)
    camera = Compose(Blur(kernel), InpaintMask(inner))
    expected = functional.conv2d(pictures, kernel.flip(0, 1).expand(2, 1, 3, 5), groups=2)
    torch.testing.assert_close(camera.A(pictures)[..., 1:-1, 2:-2], expected)


def test_a_motion_along_an_axis_is_a_mean_of_neighbours() -> None:
    assert (
        torch.allclose(MotionBlur(5).kernel[2], torch.full((5,), 0.2).double()) and MotionBlur(5).kernel[0].sum() == 0
    )
    assert torch.equal(MotionBlur(5, 90).kernel, MotionBlur(5).kernel.mT)
    assert torch.allclose(MotionBlur(4).kernel[2], torch.tensor([0.125, 0.25, 0.25, 0.25, 0.125]).double())
    diagonal = MotionBlur(7, 45).kernel
    assert torch.allclose(diagonal, diagonal.flip(0, 1)) and diagonal[0, -1] > 0 and diagonal[0, 0] == 0
    assert MotionBlur(9, 33.0).kernel.sum().item() == pytest.approx(1)


def test_noise_of_a_physics_is_left_out() -> None:
    physics, pictures = Physics(), noise(1, 1, 6, 8)
    assert not torch.equal(physics(pictures), physics(pictures))
    assert torch.equal(FromDeepinv(physics).A(pictures), physics.A(pictures))


def test_conjugate_gradients_leave_a_solved_sample_alone() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 1e4], dtype=torch.float64))
    target = torch.stack([torch.zeros(3), torch.ones(3), torch.tensor([1.0, 0.0, 0.0])]).double()
    found = conjugate_gradients(lambda u: u @ matrix, target)
    torch.testing.assert_close(found, target / matrix.diagonal())


@pytest.mark.parametrize(("call", "message"), [
    (lambda: InpaintMask(torch.zeros(8, 8)), "mask of shape .* is 0 everywhere; give 1"),
    (lambda: InpaintMask(torch.full((8, 8), 2.0)), "mask .* outside of 0 to 1"),
    (lambda: InpaintMask(torch.full((8, 8), math.nan)), "mask .* outside of 0 to 1"),
    (lambda: InpaintMask(torch.ones(8, 8)).A(torch.zeros(1, 3, 16, 16)), r"mask of shape \(8, 8\) .* \(1, 3, 16, 16\)"),
    (lambda: InpaintMask(torch.ones(2, 1, 8, 8)).A(torch.zeros(3, 3, 8, 8)), r"mask of shape \(2, 1, 8, 8\) does not fit"),
    (lambda: InpaintMask(torch.ones(1, 1, 1, 8, 8)).A(torch.zeros(3, 3, 8, 8)), "does not fit pictures"),
    (lambda: GaussianBlur(4, 1.0), "kernel_size=4 has no middle pixel; use an odd int .* such as 5"),
    (lambda: GaussianBlur(5, 0.0), "sigma=0.0 is out of range"),
    (lambda: GaussianBlur(5, 1.0, "mirror"), "padding='mirror' is not known; use one of reflect"),
    (lambda: GaussianBlur(17, 1.0).A(torch.zeros(1, 3, 8, 8)), "kernel_size=17 is too wide to reflect a side of 8"),
    (lambda: Blur(torch.ones(4, 3)), "kernel of shape .*: its height=4 has no middle pixel"),
    (lambda: Blur(torch.zeros(3, 3)), r"kernel of shape \(3, 3\) is zero"),
    (lambda: Blur(torch.ones(3)), r"kernel has shape \(3,\)"),
    (lambda: MotionBlur(0), "length=0 is out of range"),
    (lambda: MotionBlur(5, math.inf), "angle=inf is not a number"),
    (lambda: SuperResolution(1), "factor=1 is out of range"),
    (lambda: SuperResolution(2, "lanczos"), "mode='lanczos' is not known"),
    (lambda: SuperResolution(3).A(torch.zeros(1, 3, 8, 9)), "factor=3 does not divide a side of 8 pixels"),
    (lambda: SuperResolution(2).A(torch.full((1, 3, 8, 8), math.nan)), "pictures is not finite in 192 of 192"),
    (lambda: SuperResolution(2).A(torch.zeros(0, 3, 8, 8)), r"pictures has shape \(0, 3, 8, 8\)"),
    (lambda: SuperResolution(2).solve(torch.zeros(1, 3, 8, 8), 0.0, 1.0), "gain=0.0 is out of range"),
    (lambda: SuperResolution(2).solve(torch.zeros(1, 3, 8, 8), 1.0, 0.0), "shift=0.0 is out of range"),
    (lambda: Compose(), "operators is empty"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_value_and_cure(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: InpaintMask(5), "mask is int; give a tensor"),
    (lambda: SuperResolution(2).A("x"), "pictures is str; give a tensor"),
    (lambda: SuperResolution(2).A(torch.zeros(1, 3, 8, 8, dtype=torch.long)), "pictures is torch.int64"),
    (lambda: Blur([[1.0]]), "kernel is list"),
    (lambda: Compose(SuperResolution(2), len), "operators has builtin_function_or_method"),
    (lambda: FromDeepinv(object()), "physics=object has no method A"),
])  # fmt: skip
def test_what_is_of_another_kind_is_a_type_error(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_an_operator_that_lacks_its_maps_says_which() -> None:
    with pytest.raises(NotImplementedError, match="LinearOperator must define _forward"):
        LinearOperator().A(torch.zeros(1, 3, 8, 8))
