import pytest
import torch
from diffusers import DDIMScheduler
from digits import CLASSES, NO_CLASS, DigitNetwork, Digits, DigitTeacher, Flow, Measures, train_classifier

from diffusers_ext.training.distillation.parameterization import NoiseSchedule


SCHEDULE = NoiseSchedule.from_scheduler(DDIMScheduler(prediction_type="v_prediction"))


def inputs(count=3):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(count, 1, 8, 8, generator=generator)
    return sample, torch.randint(1000, (count,), generator=generator), torch.arange(count) % CLASSES


def test_a_diffusion_of_a_gaussian_is_its_flow():
    # data N(0, c^2): the means of x_0 and eps given x = a x_0 + s eps are a c^2 x / (a^2 c^2 + s^2) and s x / (a^2 c^2 + s^2)
    variance = 0.25

    def velocity(sample, timesteps):
        place = timesteps.double()
        low = place.floor().long().clamp(max=998)
        # what the table says between two timesteps: straight in the logarithm of noise by signal
        first, second = (torch.stack(SCHEDULE.levels(at)) for at in (low, low + 1))
        ratio = torch.lerp((first[1] / first[0]).log(), (second[1] / second[0]).log(), place - low).exp()
        signal = (1 + ratio.square()).rsqrt()
        spread = ratio * signal
        factor = signal * spread * (1 - variance) / (signal.square() * variance + spread.square())
        return factor[:, None, None, None] * sample

    sigma = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    sample = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Flow(SCHEDULE)(velocity, sample, sigma)
    clean, noise = 1 - sigma, sigma
    factor = (noise - clean * variance) / (clean.square() * variance + noise.square())
    # the timestep is told in float32
    assert torch.allclose(found, factor[:, None, None, None] * sample, rtol=1e-4, atol=1e-5)


def test_timesteps_of_a_flow_have_the_same_ratio_of_signal_and_noise():
    timesteps = torch.tensor([0, 1, 250, 777, 999])
    signal, spread = SCHEDULE.levels(timesteps)
    found = Flow(SCHEDULE).timesteps(spread / (signal + spread))
    assert torch.allclose(found, timesteps.float(), atol=1e-2)
    assert Flow(SCHEDULE).timesteps(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]


def test_untrained_guidance_changes_nothing():
    network = DigitNetwork()
    sample, timesteps, labels = inputs()
    told = network(sample, timesteps, labels, torch.tensor([1.0, 2.0, 5.0])).sample
    assert torch.equal(told, network(sample, timesteps, labels).sample)


def test_guidance_is_the_formula_of_the_pipelines():
    teacher = DigitTeacher(DigitNetwork(), SCHEDULE)
    sample, timesteps, labels = inputs()
    conditional = teacher.unet(sample, timesteps, labels).sample
    unconditional = teacher.unet(sample, timesteps, torch.full_like(labels, NO_CLASS)).sample
    scale = torch.tensor([1.0, 2.0, 4.0])
    expected = unconditional + scale[:, None, None, None] * (conditional - unconditional)
    assert torch.allclose(teacher.guided(sample, timesteps, labels, scale), expected, atol=1e-5)
    assert torch.allclose(teacher.guided(sample, timesteps, labels, 1.0), conditional, atol=1e-6)


@pytest.fixture(scope="module")
def measures():
    """Measures on bright columns, of which the label says which."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 8
    pictures = -torch.ones(600, 1, 8, 8)
    pictures[torch.arange(600), :, :, labels] = 1.0
    pictures += 0.1 * torch.randn(pictures.shape, generator=generator)
    columns = Digits(pictures[:400], labels[:400], pictures[400:], labels[400:])
    return Measures(columns, train_classifier(columns))


def test_the_data_themselves_are_near(measures):
    found = measures(measures.digits.held_out, measures.digits.held_out_labels)
    assert found["frechet"] < 1e-6 and found["frechet_pixels"] < 1e-6 and found["sliced_w2"] == 0.0
    assert found["right"] == measures.accuracy == 1.0 and found["coverage"] == found["apart"] == 1.0


def test_a_mode_that_is_left_out_and_wrong_labels_are_seen(measures):
    digits = measures.digits
    kept = digits.held_out_labels > 0
    found = measures(digits.held_out[kept], digits.held_out_labels[kept])
    assert found["coverage"] == pytest.approx(0.875) and found["right"] == 1.0
    assert found["frechet"] > 0.01 and found["sliced_w2"] > 0.01
    assert measures(digits.held_out, (digits.held_out_labels + 1) % 8)["right"] == 0.0


def test_repeated_pictures_are_seen(measures):
    assert measures(measures.digits.pictures, measures.digits.labels)["apart"] == 0.0


def test_samples_that_are_not_finite_are_refused(measures):
    broken = torch.full((10, 1, 8, 8), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        measures(broken, torch.zeros(10, dtype=torch.long))
