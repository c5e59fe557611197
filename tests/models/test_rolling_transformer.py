"""The transformer of rolling diffusion: one time a frame, context, the causal mask, gradients and files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_ext.models import RollingTransformer1DModel
from tests.helpers.fresh_process import digest, facts, run_fresh


def network(seed: int = 0, **settings: Any) -> RollingTransformer1DModel:
    """A small one with weights everywhere, unlike a new one, which gives zeros."""
    sizes = {"in_channels": 3, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RollingTransformer1DModel(**sizes).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    return model


def frames(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([[0, 120, 333, 700, 999]])


def test_a_new_network_predicts_zero_and_can_learn() -> None:
    model = RollingTransformer1DModel(3, condition_channels=2, num_layers=1)
    prediction = model(frames(2, 5, 3), TIMES, frames(2, 5, 2)).sample
    assert not prediction.any()
    (prediction - 1.0).square().sum().backward()
    assert model.proj_out.bias.grad.abs().sum() > 0


@torch.no_grad()
def test_equal_times_may_be_given_once() -> None:
    model, sample = network(), frames(2, 5, 3)
    expected = model(sample, 333).sample
    for times in (torch.tensor(333), torch.full((2,), 333), torch.full((1, 5), 333), torch.full((2, 5), 333.0)):
        torch.testing.assert_close(model(sample, times).sample, expected)
    # so a sample may have its own
    both = model(sample, torch.tensor([333, 20])).sample
    torch.testing.assert_close(both[1:], model(sample[1:], 20).sample)


@torch.no_grad()
def test_every_frame_is_told_its_own_time() -> None:
    model, sample = network(causal=True), frames(1, 5, 3)
    changed = TIMES.clone()
    changed[0, 3] = 5
    difference = (model(sample, TIMES).sample - model(sample, changed).sample).abs().amax(-1)[0]
    assert (difference[:3] == 0).all() and (difference[3:] > 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_decides_whether_later_frames_are_seen(causal: bool) -> None:
    model, sample = network(causal=causal), frames(1, 5, 3)
    changed = sample.clone()
    changed[:, 4] += 1.0
    difference = (model(sample, TIMES).sample - model(changed, TIMES).sample).abs().amax(-1)[0]
    assert difference[4] > 1e-4
    assert (difference[:4] == 0).all() if causal else (difference[:4] > 1e-5).all()


@torch.no_grad()
def test_positions_count_from_the_window() -> None:
    # With a causal mask and attention to nothing but itself the context cannot matter, unless it moves the positions.
    model, window = network(causal=True), frames(1, 5, 3)
    for block in model.blocks:
        block.to_out.weight.zero_()
    alone = model(window, TIMES).sample
    with_context = torch.cat([frames(1, 2, 3, seed=9), window], 1)
    times = torch.cat([torch.zeros(1, 2, dtype=torch.long), TIMES], 1)
    torch.testing.assert_close(model(with_context, times, num_context=2).sample[:, 2:], alone)
    assert (model(with_context, times, num_context=0).sample[:, 2:] - alone).abs().max() > 1e-3


@torch.no_grad()
def test_a_masked_condition_is_none_at_all() -> None:
    model, sample, condition = network(condition_channels=2), frames(2, 5, 3), frames(2, 5, 2)
    without = model(sample, TIMES).sample
    masked = model(sample, TIMES, condition, torch.zeros(2, 5, dtype=torch.bool)).sample
    torch.testing.assert_close(masked, without)
    assert (model(sample, TIMES, condition).sample - without).abs().max() > 1e-3
    mask = torch.tensor([[True] * 5, [False] * 5])
    mixed = model(sample, TIMES, condition, mask).sample
    torch.testing.assert_close(mixed[1], without[1])
    torch.testing.assert_close(mixed[0], model(sample, TIMES, condition).sample[0])


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = network(condition_channels=2).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(frames(2, 5, 3), TIMES, frames(2, 5, 2)).sample.square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert len(gradients[0]) > 20
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@torch.no_grad()
def test_half_precision_stays_near() -> None:
    sample = frames(2, 5, 3)
    exact = network()(sample, TIMES).sample
    rough = network().to(torch.bfloat16)(sample.bfloat16(), TIMES).sample
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    model = network(condition_channels=2, causal=True)
    model.save_pretrained(tmp_path)
    assert RollingTransformer1DModel.from_pretrained(tmp_path).config.causal
    code = f"""
import torch
from tests.helpers.fresh_process import digest
model = _loaded("models").RollingTransformer1DModel.from_pretrained({str(tmp_path)!r})
generator = torch.Generator().manual_seed(1)
with torch.no_grad():
    print("digest", digest(model(torch.randn(2, 5, 3, generator=generator), torch.tensor([[0, 120, 333, 700, 999]])).sample))
"""
    assert facts(run_fresh(code))["digest"] == digest(model(frames(2, 5, 3), TIMES).sample)


def test_wrong_calls_and_settings_are_named() -> None:
    model, sample, condition = network(condition_channels=2), frames(2, 5, 3), frames(2, 5, 2)
    calls: list[tuple[dict[str, Any], str]] = [
        ({"sample": frames(2, 5, 4)}, r"sample has the shape \(2, 5, 4\); this network needs \(batch, frames, 3\)"),
        ({"sample": frames(2, 0, 3)}, "sample has the shape"),
        ({"timestep": TIMES[:, :4]}, r"timestep of shape \(1, 4\) does not fit"),
        ({"timestep": "999"}, "timestep='999'"),
        ({"condition": condition[:, :4]}, r"condition=\(2, 4, 2\) does not fit"),
        ({"condition": 5}, "condition=int does not fit"),
        ({"condition_mask": torch.ones(2, 5)}, "condition_mask=.* give a bool tensor"),
        ({"num_context": 6}, "num_context=6"),
    ]
    for changes, message in calls:
        with pytest.raises(ValueError, match=message):
            model(**{"sample": sample, "timestep": TIMES, **changes})
    with pytest.raises(TypeError, match="sample is list"):
        model([1.0], TIMES)
    with pytest.raises(ValueError, match="without condition_channels"):
        network()(sample, TIMES, condition)
    for settings in ({"num_layers": 0}, {"attention_head_dim": 7}, {"condition_channels": -1}, {"mlp_ratio": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
            RollingTransformer1DModel(**{"in_channels": 3, **settings})
