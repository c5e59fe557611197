import motion
import pytest
import torch

from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler, RollingTransformer1DModel
from diffusers_ext.training.sequences import Segment


def recording(frames: int = 200, channels: int = 2) -> torch.Tensor:
    return torch.randn(frames, channels, generator=torch.Generator().manual_seed(0))


def pipeline(step: int) -> RollingLadderPipeline:
    network = RollingTransformer1DModel(2, 1, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    scheduler = RollingLadderScheduler(prediction_type="flow_prediction", window_length=8, ladder_step=step)
    pipe = RollingLadderPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_recording_itself_is_without_fault():
    truth = recording()
    figures = motion.measured(truth[None], truth)
    assert figures == {"r2_of_mean": 1.0, "r2": 1.0, "variance": 1.0, "jitter": 1.0, "spectrum": 0.0}


def test_a_stream_has_a_frame_for_each_condition_and_the_evaluations_of_its_ladder():
    pipe = pipeline(step=2)
    frames = motion.streamed(pipe, torch.zeros(22, 1), per_roll=3, samples=5)
    assert frames.shape == (5, 22, 2)
    # (R - 1) m + ceil(F / l) m
    assert pipe.network_evaluations == 3 * 3 + 11 * 3


def test_seams_of_noise_are_none_whatever_frame_a_stream_begins_at():
    pipe, test = pipeline(step=2), Segment(recording(600), torch.zeros(600, 1))
    first = motion.streamed(pipe, test.condition, 1, 8)
    found = motion.seams(pipe, first, test, 1)
    # steps of noise: six thousand squares of them at borders and inside, and neighbours share a frame
    assert found["seam"] == pytest.approx(1.0, abs=0.05) and 0.005 < found["seam_error"] < 0.05


def test_the_page_has_a_line_for_each_ladder_and_one_for_the_filter():
    figures = {"r2_of_mean": 0.3, "r2": 0.1, "variance": 0.9, "jitter": 1.1, "spectrum": 0.25}
    ladders = [
        {"l": 1, "m": 1, "nfe": 1.0, **figures},
        {"l": 4, "m": 1, "nfe": 0.25, "seam": 1.02, "seam_error": 0.01, **figures},
    ]
    filtered = {"past": 10, "ahead": 39, "ridge": 0.1, **figures, "r2": 0.28, "r2_of_mean": 0.28}
    speed = [{"l": 1, "frames_a_second": 100.0, "over_ladder_1": 1.0}]
    text = motion.page(
        {"quality": {"rows": 2_040, "samples": 16, "ladders": ladders, "wiener": filtered}, "speed": speed}
    )
    assert "| 1 (1) | 1 | 0.300 | 0.100 | 0.900 | 1.100 | 0.250 | - |" in text
    assert "| 4 (1) | 0.25 | 0.300 | 0.100 | 0.900 | 1.100 | 0.250 | 1.020 +- 0.010 |" in text
    assert "| Wiener filter | - | 0.280 | - | 0.900 |" in text and "10 frames back and 39 ahead" in text
