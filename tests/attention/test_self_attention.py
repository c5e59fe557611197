"""The processor computes what diffusers' own computes, reads what it says it reads, and leaves no trace."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from diffusers_ext.attention import (
    SelfAttentionEnergyProcessor,
    SelfAttentionRecord,
    installed_processors,
    select_self_attention_layers,
    self_attention_layers,
)
from diffusers_ext.guidance import mean_square
from tests.helpers.tiny_models import tiny_unet


ATTENTION = {
    "plain": {},
    "residual and rescaling": {"residual_connection": True, "rescale_output_factor": 1.7},
    "group norm": {"norm_num_groups": 4},
    "spatial norm": {"spatial_norm_dim": 4},
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
    "query and key norm": {"qk_norm": "layer_norm"},
    "scale and bias": {"bias": True, "scale_qk": False},
}


def attention(**options) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=32, heads=2, dim_head=8, **options).eval()


def processors(record: SelfAttentionRecord, **options):
    return lambda name, before: SelfAttentionEnergyProcessor(name, record, before, **options)


def record_of(layer: Attention, *inputs: torch.Tensor) -> SelfAttentionRecord:
    record = SelfAttentionRecord(mean_square)
    with installed_processors({"layer": layer}, processors(record)):
        for phase, hidden in zip(("reference", "source"), inputs, strict=True):
            record.phase = phase
            layer(hidden)
    return record


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("picture", [False, True], ids=["sequence", "picture"])
def test_the_output_is_that_of_the_stock_processor(options, picture):
    if "spatial_norm_dim" in options and not picture:
        pytest.skip("a spatial norm takes pictures")
    layer = attention(**options)
    hidden = torch.randn(3, 32, 4, 6) if picture else torch.randn(3, 24, 32)
    extra = {"temb": torch.randn(3, 4, 2, 3)} if "spatial_norm_dim" in options else {}
    layer.set_processor(AttnProcessor2_0() if "qk_norm" in options else AttnProcessor())
    expected = layer(hidden, **extra)
    record = SelfAttentionRecord(mean_square)
    with installed_processors({"layer": layer}, processors(record)):
        torch.testing.assert_close(layer(hidden, **extra), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", None])
def test_a_context_and_a_mask_are_honoured(norm):
    layer = attention(cross_attention_dim=12, cross_attention_norm=norm)
    hidden, context = torch.randn(2, 10, 32), torch.randn(2, 7, 12)
    mask = torch.zeros(2, 1, 7)
    mask[:, :, 5:] = -1e4
    layer.set_processor(AttnProcessor())
    expected = layer(hidden, context, attention_mask=mask)
    record = SelfAttentionRecord(mean_square)
    with installed_processors({"layer": layer}, processors(record)):
        torch.testing.assert_close(layer(hidden, context, attention_mask=mask), expected)


def test_the_energy_is_the_mean_square_of_the_probabilities():
    layer = attention()
    reference, source = torch.randn(3, 24, 32), torch.randn(3, 24, 32)

    def probabilities(hidden: torch.Tensor) -> torch.Tensor:
        query, key = (f(hidden).view(3, 24, 2, 8).transpose(1, 2) for f in (layer.to_q, layer.to_k))
        return torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, dim=-1)

    expected = (probabilities(source) - probabilities(reference)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(record_of(layer, reference, source).energies["layer"], expected)


def test_the_energy_of_equal_passes_is_exactly_zero():
    hidden = torch.randn(2, 24, 32)
    assert record_of(attention(), hidden, hidden).energies["layer"].tolist() == [0.0, 0.0]


def test_no_probabilities_are_kept():
    record = record_of(attention(), torch.randn(1, 24, 32), torch.randn(1, 24, 32))
    query, key = record.queries_and_keys["layer"]
    assert query.shape == key.shape == (2, 24, 8)
    assert record.energies["layer"].shape == (1,)


@pytest.mark.parametrize("heads_at_a_time", [1, 2, 3])
def test_parts_of_a_few_heads_give_the_same_output_energy_and_gradient(monkeypatch, heads_at_a_time):
    torch.manual_seed(0)
    layer = Attention(query_dim=32, heads=4, dim_head=8).eval()
    reference, source = torch.randn(2, 24, 32), torch.randn(2, 24, 32)

    def run() -> tuple[torch.Tensor, ...]:
        record = SelfAttentionRecord(mean_square)
        leaf = source.clone().requires_grad_(True)
        with installed_processors({"layer": layer}, processors(record)):
            with torch.no_grad():
                layer(reference)
            record.phase = "source"
            output = layer(leaf)
            energy = record.energies["layer"]
            (gradient,) = torch.autograd.grad(1e4 * energy.sum() + output.square().sum(), leaf)
        return output.detach(), energy.detach(), gradient

    whole = run()
    monkeypatch.setattr("diffusers_ext.attention.self_attention.PART_SIZE", heads_at_a_time * 2 * 24 * 24)
    for part, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_compared_in_float32():
    layer = attention().half()
    hidden = torch.randn(1, 24, 32)
    moved = hidden + 2e-3 * torch.randn(1, 24, 32)
    exact = record_of(attention(), hidden.half().float(), moved.half().float()).energies["layer"]
    found = record_of(layer, hidden.half(), moved.half()).energies["layer"]
    assert found.dtype == torch.float32 and 0 < exact.item() < 1e-6
    assert abs(found.item() / exact.item() - 1) < 0.1


def test_a_layer_that_is_not_read_runs_its_own_processor():
    layer, calls = attention(), []

    class Own:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            calls.append(hidden_states.shape)
            return hidden_states

    layer.set_processor(Own())
    record = SelfAttentionRecord(mean_square, "target")
    with installed_processors({"layer": layer}, processors(record, reads=lambda name, tokens: tokens <= 16)):
        layer(torch.randn(1, 24, 32))  # too many tokens
        record.phase = "source"
        layer(torch.randn(1, 16, 32))  # the record compares with the target pass
        assert len(calls) == 2 and not record.queries_and_keys and record.tokens == {16, 24}
        for phase in ("reference", "target"):
            record.phase = phase
            layer(torch.randn(1, 16, 32))
    assert len(calls) == 2 and record.energies["layer"].item() > 0


def test_layers_get_back_the_same_processors_also_after_an_error():
    unet = tiny_unet()

    class Own(nn.Module):
        def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            return hidden_states

    layers = self_attention_layers(unet)
    first = next(iter(layers.values()))
    first.set_processor(Own())
    before = dict(unet.attn_processors)
    others = [name for name in before if name.removesuffix(".processor") not in layers]
    assert others
    record = SelfAttentionRecord(mean_square)
    with pytest.raises(KeyError), installed_processors(layers, processors(record)):
        assert all(unet.attn_processors[name] is before[name] for name in others)
        assert isinstance(first.processor, SelfAttentionEnergyProcessor)
        raise KeyError
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert "processor" in first._modules


def test_two_energies_cannot_share_a_layer():
    layers = {"layer": attention()}
    record = SelfAttentionRecord(mean_square)

    with installed_processors(layers, processors(record)), pytest.raises(ValueError, match="sum of their scales"):
        with installed_processors(layers, processors(record)):
            pass


def test_layers_are_chosen_by_name_or_by_its_beginning():
    unet = tiny_unet()
    every = select_self_attention_layers(unet)
    assert len(every) > 2 and all(name.endswith("attn1") for name in every)
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert list(select_self_attention_layers(unet, [name])) == [name]
    chosen = list(select_self_attention_layers(unet, ["up_blocks", "mid_block"]))
    assert chosen == [name for name in every if name.startswith(("up_blocks.", "mid_block."))]


def test_an_unknown_layer_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="up_block.1.*did you mean 'up_blocks.*there are: down_blocks.0"):
        select_self_attention_layers(tiny_unet(), "up_block.1")
    with pytest.raises(ValueError, match="has no self-attention"):
        select_self_attention_layers(nn.Linear(1, 1))
