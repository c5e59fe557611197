from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

from diffusers_ext.training.adapters import SharedBase


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        8, 2, 2, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def predict(unet: UNet2DModel, seed: int = 0) -> torch.Tensor:
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    return unet(x, torch.tensor([3, 700])).sample


@pytest.fixture
def base() -> SharedBase:
    return SharedBase(tiny_unet(), ["student", "fake"], rank=2)


def step(base: SharedBase, name: str) -> None:
    """A step of plain gradient descent on one adapter."""
    with base.using(name):
        loss = predict(base.network).square().mean()
    loss.backward()
    with torch.no_grad():
        for value in base.network.parameters():
            if value.grad is not None:
                value -= 0.5 * value.grad
                value.grad = None


def test_new_adapters_change_nothing():
    # a convolution without gradients may be another kernel, whose last bits differ
    before = predict(tiny_unet().requires_grad_(False))
    base = SharedBase(tiny_unet(), ["student", "fake"], rank=2)
    assert torch.equal(before, predict(base.network)), "no adapter is at work outside of `using`"
    for name in ("student", "fake"):
        with base.using(name):
            assert torch.equal(before, predict(base.network))


def test_an_adapter_is_trained_without_the_others_and_the_base(base: SharedBase):
    teacher = predict(base.network).detach()
    frozen = {key: value.detach().clone() for key, value in base.network.named_parameters()}
    for _ in range(3):
        step(base, "student")
    assert torch.equal(predict(base.network), teacher), "the teacher stays as it was, bit for bit"
    with base.using("fake"):
        assert torch.equal(predict(base.network), teacher)
    with base.using("student"):
        assert not torch.equal(predict(base.network), teacher)
    moved = {key for key, value in base.network.named_parameters() if not torch.equal(value, frozen[key])}
    assert moved and moved <= base.parameter_names("student")


def test_the_adapters_share_out_all_that_is_trainable(base: SharedBase):
    student, fake = (base.parameter_names(name, "unet.") for name in ("student", "fake"))
    trainable = {f"unet.{key}" for key, value in base.network.named_parameters() if value.requires_grad}
    assert student and fake and not student & fake and student | fake == trainable


def test_switching_within_a_step_loses_no_gradient(base: SharedBase):
    # the student's graph is built first, then teacher and fake score are asked, then the gradient flows
    step(base, "student")

    def gradients(between: bool) -> list[torch.Tensor]:
        with base.using("student"):
            output = predict(base.network)
        if between:
            with torch.no_grad(), base.using("fake"):
                predict(base.network, 1)
            with torch.no_grad(), base.using(None):
                predict(base.network, 2)
        output.square().mean().backward()
        named = dict(base.network.named_parameters())
        found = [named[key].grad.clone() for key in sorted(base.parameter_names("student"))]
        assert all(named[key].grad is None for key in base.parameter_names("fake"))
        for value in named.values():
            value.grad = None
        return found

    plain, switched = gradients(False), gradients(True)
    assert any(bool(value.any()) for value in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, switched))


def test_flags_that_a_trainer_set_survive_a_switch(base: SharedBase):
    named = dict(base.network.named_parameters())
    for key in base.parameter_names("fake"):
        named[key].requires_grad_(False)
    with base.using("student"), base.using("fake"), base.using(None):
        pass
    assert {key for key, value in named.items() if value.requires_grad} == base.parameter_names("student")


def test_blocks_nest_and_end_on_an_error(base: SharedBase):
    step(base, "student")
    teacher = predict(base.network)
    with base.using("student"):
        student = predict(base.network)
        with pytest.raises(RuntimeError, match="stop"), base.using(None):
            assert torch.equal(predict(base.network), teacher)
            raise RuntimeError("stop")
        assert torch.equal(predict(base.network), student)
    assert torch.equal(predict(base.network), teacher)


def test_a_gradient_reaches_the_input_through_the_frozen_fake_score(base: SharedBase):
    # what the generator's adversarial loss needs
    for key, value in base.network.named_parameters():
        value.requires_grad_(key in base.parameter_names("student"))
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with base.using("fake"):
        base.network(x, 5).sample.sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert all(value.grad is None for value in base.network.parameters())


def test_the_memory_of_the_adapters_is_small(base: SharedBase):
    adapters = sum(value.numel() for value in base.network.parameters() if value.requires_grad)
    assert adapters < 0.5 * sum(value.numel() for value in base.network.parameters())


def test_a_saved_adapter_loads_into_a_stock_pipeline(tmp_path: Path):
    from diffusers import UNet2DConditionModel

    def network() -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            8, 4, 4, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip

    def ask(unet: UNet2DConditionModel) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        x, words = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        return unet(x, 10, words).sample

    base = SharedBase(network(), ["student", "fake"], rank=2)
    named = dict(base.network.named_parameters())
    with torch.no_grad():
        for key in base.parameter_names("student"):
            named[key] += 0.1 * torch.randn(named[key].shape, generator=torch.Generator().manual_seed(2))
    with base.using("student"):
        expected = ask(base.network)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=base.state_dict("student"))
    assert all(key.startswith("unet.") for key in load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    stock = network()
    state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, stock)
    torch.testing.assert_close(ask(stock), expected, rtol=0, atol=1e-6)


def test_a_merged_network_computes_what_the_adapter_does(base: SharedBase):
    for _ in range(3):
        step(base, "student")
    with base.using("student"):
        expected = predict(base.network)
    plain = tiny_unet()
    teacher = predict(plain)
    plain.load_state_dict(base.merged_state_dict("student"))
    torch.testing.assert_close(predict(plain), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(teacher, expected, atol=1e-4)
    plain.load_state_dict(base.merged_state_dict("fake"))
    assert torch.equal(predict(plain), teacher)


def test_wrong_calls_are_answered_in_one_sentence(base: SharedBase):
    with (
        pytest.raises(ValueError, match="adapter 'teacher' is unknown; use one of student, fake"),
        base.using("teacher"),
    ):
        pass
    for arguments, message in (
        ({"names": ["a"], "rank": 0}, "rank=0 must be 1 or more"),
        ({"names": ["a", "a"]}, "must be one or more different words"),
        ({"names": ["a.b"]}, "must be one or more different words without dots"),
        ({"names": ["a"], "target_modules": ["nothing"]}, "name no layer of UNet2DModel"),
    ):
        with pytest.raises(ValueError, match=message):
            SharedBase(tiny_unet(), **arguments)
