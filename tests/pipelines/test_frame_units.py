import json

import pytest
import torch

from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler, RollingTransformer1DModel
from diffusers_ext.pipelines.frame_units import ChannelUnits


MEANS = {"frame_mean": [500.0, -3.0], "condition_mean": [10.0]}
DEVIATIONS = {"frame_std": [100.0, 0.5], "condition_std": [4.0]}


def pipeline(**statistics: list[float]) -> RollingLadderPipeline:
    """A network with random answers: a new one says 0 to everything."""
    torch.manual_seed(0)
    network = RollingTransformer1DModel(2, 1, num_layers=1, num_attention_heads=2, attention_head_dim=8, **statistics)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    scheduler = RollingLadderScheduler(
        prediction_type="flow_prediction", window_length=6, ladder_step=2, context_length=3, context_timestep=20
    )
    pipe = RollingLadderPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def outside(values: torch.Tensor, kind: str) -> torch.Tensor:
    return values * torch.tensor(DEVIATIONS[f"{kind}_std"]) + torch.tensor(MEANS[f"{kind}_mean"])


@pytest.mark.parametrize("warmup", ["init", "pad"])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_a_stream_in_units_is_the_stream_without_them_in_other_numbers(warmup: str, with_prefix: bool):
    cond, prefix = torch.randn(2, 20, 1), torch.randn(2, 4, 2) if with_prefix else None
    plain = pipeline()(cond, prefix=prefix, warmup=warmup, generator=torch.Generator().manual_seed(1)).frames
    units = pipeline(**MEANS, **DEVIATIONS)
    frames = units(
        outside(cond, "condition"),
        prefix=None if prefix is None else outside(prefix, "frame"),
        warmup=warmup,
        generator=torch.Generator().manual_seed(1),
    ).frames
    torch.testing.assert_close(frames, outside(plain, "frame"), atol=2e-2, rtol=1e-4)


@pytest.mark.parametrize("statistics", [MEANS, DEVIATIONS])
def test_mean_and_deviation_work_alone(statistics: dict[str, list[float]]):
    plain = pipeline()(torch.ones(1, 8, 1), generator=torch.Generator().manual_seed(1)).frames
    units = pipeline(**statistics)
    cond = ChannelUnits.of(statistics, "condition").outward(torch.ones(1, 8, 1))
    frames = units(cond, generator=torch.Generator().manual_seed(1)).frames
    torch.testing.assert_close(frames, ChannelUnits.of(statistics, "frame").outward(plain), atol=1e-3, rtol=1e-4)


def test_a_callback_sees_and_says_units():
    seen: list[dict[str, torch.Tensor]] = []

    def look(pipe, first_frame, tensors):
        seen.append(tensors)

    cond, generator = torch.randn(1, 20, 1), torch.Generator().manual_seed
    units = pipeline(**MEANS, **DEVIATIONS)
    frames = units(outside(cond, "condition"), generator=generator(1), callback_on_chunk_end=look).frames
    torch.testing.assert_close(torch.cat([tensors["frames"] for tensors in seen], 1), frames)
    # behind the first chunk of 2 stand 4 frames of the window
    torch.testing.assert_close(seen[0]["condition"], outside(cond[:, 2:6], "condition"), atol=1e-4, rtol=1e-5)

    def say(of: str):
        def answer(pipe, first_frame, tensors):
            if first_frame == 4:
                zeros = {name: torch.zeros_like(value) for name, value in tensors.items()}
                return zeros if of == "plain" else {n: outside(v, n.rstrip("s")) for n, v in zeros.items()}

        return answer

    changed = units(outside(cond, "condition"), generator=generator(1), callback_on_chunk_end=say("units")).frames
    plain = pipeline()(cond, generator=generator(1), callback_on_chunk_end=say("plain")).frames
    torch.testing.assert_close(changed, outside(plain, "frame"), atol=2e-2, rtol=1e-4)


def test_units_survive_saving(tmp_path):
    pipeline(**MEANS, **DEVIATIONS).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["frame_std"] == [100.0, 0.5]
    loaded = RollingLadderPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    frames = [
        pipe(torch.ones(1, 4, 1), generator=torch.Generator().manual_seed(0)).frames
        for pipe in (loaded, pipeline(**MEANS, **DEVIATIONS))
    ]
    assert torch.equal(*frames)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"frame_mean": [1.0]}, "frame_mean=of 1 does not fit the 2 channels; give a list of 2 finite numbers"),
        ({"frame_std": [1.0, 0.0]}, "frame_std holds 0.0; give a list of 2 finite numbers above 0"),
        ({"condition_std": [-1.0]}, "condition_std holds -1.0"),
        ({"condition_mean": [float("nan")]}, "condition_mean holds nan"),
        ({"condition_mean": 3.0}, "condition_mean=float does not fit the 1 channels"),
        ({"frame_std": ["1", "2"]}, "frame_std holds '1'"),
    ],
)
def test_units_that_are_none_are_refused(statistics: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RollingTransformer1DModel(2, 1, **statistics)


def test_numbers_that_overflow_in_the_networks_units_are_refused():
    units = pipeline(frame_std=[1e-20, 1.0], condition_std=[1e-20])
    with pytest.raises(ValueError, match="prefix holds values that are infinite"):
        units(torch.ones(1, 4, 1), prefix=torch.full((1, 2, 2), 1e30))
    with pytest.raises(ValueError, match="cond yielded values at frame 0 that are infinite"):
        units(torch.full((1, 4, 1), 1e30))
