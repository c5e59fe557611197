"""What holds for every inversion method: costs, batches, precision, callbacks, wrong calls."""

import inspect
from dataclasses import replace

import pytest
import torch

from diffusers_ext.inversion import (
    DEFAULT_INVERSION,
    INVERSIONS,
    Denoiser,
    InversionOutput,
    InversionProgress,
    Inverted,
    invert,
    regenerate,
    regenerate_states,
    with_guidance,
)
from tests.inversion.subjects import counted, gaussian, ladder, linear, pictures


# Settings in which a closed-form network tells methods apart quickly.
QUICK = {"fixed_point": {"iterations": 3}, "null_text": {"inner_steps": 4, "early_stop": 0.0}}
VARIANTS = [
    *((name, QUICK.get(name, {})) for name in INVERSIONS),
    ("fixed_point", {"iterations": 0}),
    ("fixed_point", {"iterations": 4, "solver": "anderson"}),
    ("fixed_point", {"iterations": 1, "solver": "gradient"}),
    ("fixed_point", {"iterations": 4, "solver": "gradient"}),
    ("null_text", {"schedule": "official", "early_stop": 0.0}),
    # so slow that only the jump to the last round gets anywhere, and no round ends a step before it
    ("null_text", {"early_stop": 0.0, "learning_rate": 1e-6}),
    ("direct", {"guidance_scale": 1.0}),
    ("direct", {"guidance_scale": None}),
    ("edit_friendly", {"guidance_scale": 1.0}),
    ("bdia", {"guidance_scale": 2.0}),
]
EXACT = [
    ("direct", {}, 7.5), ("direct", {"guidance_scale": 2}, 2.0), ("direct", {"guidance_scale": None}, 5.0),
    ("edit_friendly", {}, 3.5), ("edit_friendly", {"eta": 0.4, "guidance_scale": 1.0}, 1.0), ("bdia", {}, 1.0),
    ("bdia", {"gamma": 1.0, "guidance_scale": 3.0}, 3.0), ("fixed_point", {"iterations": 90}, 1.0),
    ("fixed_point", {"iterations": 25, "solver": "anderson"}, 1.0),
]  # fmt: skip


def run(
    name: str, denoiser: Denoiser, start: torch.Tensor, steps: int = 4, kind: str = "epsilon", **settings
) -> Inverted:
    if name == "edit_friendly":
        settings.setdefault("noise", torch.stack([pictures(len(start), seed) for seed in range(steps)]).to(start))
    return invert(denoiser, start, ladder(steps, kind), name, **settings)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name, settings, scale", EXACT)
def test_the_exact_methods_lead_back_to_rounding(name, settings, scale, kind):
    start, denoiser = pictures(), gaussian(kind=kind)
    inverted = run(name, denoiser, start, 8, kind, **settings)
    assert torch.equal(inverted.latents[0], start)
    back = regenerate(denoiser, inverted, ladder(8, kind), scale)
    assert float((back - start).abs().max()) <= 1e-9


@pytest.mark.parametrize("name, settings", VARIANTS)
def test_passes_are_those_that_the_network_saw_and_the_table_says(name, settings):
    denoiser, counter = counted(gaussian())
    inverted = run(name, denoiser, pictures(), **settings)
    assert (inverted.forward_passes, inverted.backward_passes) == (counter.forward, counter.backward)
    assert (counter.forward, counter.backward) == tuple(2 * n for n in INVERSIONS[name].passes(4, **settings))


@pytest.mark.parametrize("name", INVERSIONS)
def test_a_method_stores_what_the_table_says(name):
    inverted = run(name, gaussian(), pictures(), **QUICK.get(name, {}))
    assert inverted.method == name
    assert inverted.latents.shape == (5, 2, 3) and torch.equal(inverted.timesteps, ladder(4).timesteps.flip(0))
    stored = [field for field in ("null_embeddings", "noise_maps", "offsets") if getattr(inverted, field) is not None]
    assert tuple(stored) == INVERSIONS[name].stores


@pytest.mark.parametrize("name", INVERSIONS)
def test_a_picture_is_inverted_as_it_would_be_alone(name):
    both, denoiser = pictures(), gaussian()
    noise = {"noise": torch.stack([pictures(2, seed) for seed in range(4)])} if name == "edit_friendly" else {}
    together = run(name, denoiser, both, **noise, **QUICK.get(name, {}))
    for row in range(2):
        alone_noise = {key: value[:, row : row + 1] for key, value in noise.items()}
        alone = run(name, denoiser.part(row), both[row : row + 1], **alone_noise, **QUICK.get(name, {}))
        for field in ("latents", *INVERSIONS[name].stores):
            torch.testing.assert_close(
                getattr(together, field)[:, row], getattr(alone, field)[:, 0], rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("name", INVERSIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_leave_states_in_float32(name, dtype):
    seen = []

    def network(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        seen.append((latents.dtype, embeddings.dtype))
        return 0.4 * latents + embeddings[:, 0]

    plain = Denoiser(network, torch.full((2, 1, 3), 0.25), torch.zeros(2, 1, 3))
    half = replace(plain, dtype=dtype)
    start = pictures().float()
    settings = {**QUICK.get(name, {})}
    expected, found = (run(name, denoiser, start, **settings) for denoiser in (plain, half))
    assert found.latents.dtype == torch.float32 and set(seen[-1]) == {dtype}
    for field in ("latents", "null_embeddings"):
        if getattr(found, field) is not None:
            assert getattr(found, field).dtype == torch.float32
            torch.testing.assert_close(getattr(found, field), getattr(expected, field), atol=0.1, rtol=0.05)
    assert not torch.equal(found.latents, found.latents.to(dtype).float())


@pytest.mark.parametrize("name", INVERSIONS)
def test_every_step_is_reported(name):
    reports: list[InversionProgress] = []
    run(name, gaussian(), pictures(), callback=reports.append, **QUICK.get(name, {}))
    assert {(report.step, report.steps) for report in reports} == {(step, 4) for step in range(4)}
    rounds = [report for report in reports if report.stage == "optimisation"]
    assert bool(rounds) == (name in ("fixed_point", "null_text"))
    assert all(report.loss >= 0 and report.picture in (0, 1) for report in rounds)


@pytest.mark.parametrize("name", INVERSIONS)
def test_it_works_in_inference_mode_and_leaves_gradients_as_they_were(name):
    with torch.inference_mode():
        inverted = run(name, gaussian(), pictures(), **QUICK.get(name, {}))
    expected = run(name, gaussian(), pictures(), **QUICK.get(name, {}))
    assert torch.equal(inverted.latents, expected.latents) and torch.is_grad_enabled()
    assert not expected.latents.requires_grad
    states = regenerate_states(gaussian(), expected, ladder(4))
    next(states)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", INVERSIONS)
def test_a_kept_inversion_leads_back_as_the_fresh_one(name, tmp_path):
    start = pictures(size=48).reshape(2, 3, 4, 4)

    def network(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return 0.4 * latents + embeddings[:, 0, :, None, None]

    denoiser = Denoiser(network, torch.ones(2, 1, 3), torch.zeros(2, 1, 3))
    steps = ladder(4)
    settings = {"generator": torch.Generator().manual_seed(0)} if name == "edit_friendly" else QUICK.get(name, {})
    inverted = invert(denoiser, start, steps, name, **settings)
    about = {"image_size": [32, 32], "scheduler": steps.config, "model": {}}
    InversionOutput.of(inverted, ["a", "b"], about).save_pretrained(tmp_path)
    kept = InversionOutput.from_pretrained(tmp_path).inverted
    assert (kept.method, kept.settings) == (name, inverted.settings)
    assert (kept.forward_passes, kept.backward_passes) == (inverted.forward_passes, inverted.backward_passes)
    assert torch.equal(regenerate(denoiser, kept, steps), regenerate(denoiser, inverted, steps))


def test_the_default_is_exact_and_every_function_has_its_defaults():
    assert "always" in INVERSIONS[DEFAULT_INVERSION].exact
    for method in INVERSIONS.values():
        further = list(inspect.signature(method.function).parameters.values())[3:]
        assert all(parameter.default is not inspect.Parameter.empty for parameter in further), method.name


def test_guidance_of_one_and_zero_are_the_two_outputs():
    null, source = pictures(seed=1), pictures(seed=2)
    torch.testing.assert_close(with_guidance(null, source, 1.0), source)
    assert torch.equal(with_guidance(null, source, 0.0), null)
    denoiser, counter = counted(gaussian())
    denoiser.guided(pictures(), torch.tensor(1), 1.0)
    assert counter.forward == 2
    denoiser.guided(pictures(), torch.tensor(1), 7.5)
    assert counter.forward == 6


def test_a_part_takes_its_rows_of_everything_that_is_a_batch():
    seen = []

    def network(latents, timestep, embeddings, **extra):
        seen.append(extra)
        return latents

    batch, sizes, shared = torch.arange(6.0).reshape(2, 3), torch.ones(1, 6), torch.tensor(3.0)
    extra = {"added_cond_kwargs": {"text_embeds": batch, "time_ids": sizes}, "timestep_cond": None, "scalar": shared}
    denoiser = Denoiser(
        network, torch.zeros(2, 1, 3), torch.zeros(2, 1, 3), source_extra=extra, null_extra={"n": batch}
    )
    denoiser.part(1).source(torch.zeros(1, 3), torch.tensor(1))
    denoiser.part(1).null(torch.zeros(1, 3), torch.tensor(1))
    added = seen[0]["added_cond_kwargs"]
    assert torch.equal(added["text_embeds"], batch[1:]) and torch.equal(added["time_ids"], sizes)
    assert seen[0]["timestep_cond"] is None and seen[0]["scalar"] == 3.0
    assert torch.equal(seen[1]["n"], batch[1:])


def test_an_edit_starts_from_the_source_and_goes_its_own_way():
    denoiser, steps, start = gaussian(), ladder(6), pictures()
    other = replace(denoiser, source_embeddings=-denoiser.source_embeddings)
    inverted = invert(denoiser, start, steps, "direct")
    edit = regenerate(other, inverted, steps, guidance_scale=2.0, source=False)
    # Without offsets this is DDIM sampling from the inverted noise.
    plain = invert(denoiser, start, steps, "ddim")
    assert torch.equal(edit, regenerate(other, plain, steps, guidance_scale=2.0))
    kept = regenerate(other, inverted, steps, guidance_scale=2.0, source=False, skip=5)
    assert float((kept - start).norm()) < float((edit - start).norm())


@pytest.mark.parametrize("name", INVERSIONS)
@pytest.mark.parametrize(
    "change, kind, answer",
    [
        ({"denoiser": None}, TypeError, "denoiser is a NoneType"),
        ({"latents": "x"}, TypeError, "latents is str"),
        ({"latents": torch.zeros(2, 3).long()}, TypeError, "latents is torch.int64"),
        (
            {"latents": torch.zeros(3, 3)},
            ValueError,
            r"latents of shape \(3, 3\) holds 3 pictures, the denoiser prompts of 2",
        ),
        ({"latents": torch.zeros(0, 3)}, ValueError, "latents has the shape"),
        ({"latents": torch.full((2, 3), float("nan"))}, ValueError, "latents holds values that are infinite or not"),
        ({"ladder": 5}, TypeError, "ladder is a int"),
        ({"callback": 5}, TypeError, "callback=5 cannot be called"),
    ],
)
def test_wrong_calls_are_answered_alike(name, change, kind, answer):
    arguments = {"denoiser": gaussian(), "latents": pictures(), "ladder": ladder(4), **change}
    with pytest.raises(kind, match=answer):
        invert(**arguments, method=name)


@pytest.mark.parametrize(
    "name, settings, answer",
    [
        ("ddimm", {}, "method='ddimm' is not one of ddim, fixed_point"),
        ("ddim", {"alignment": "mached"}, "alignment='mached'"),
        ("fixed_point", {"iterations": -1}, "iterations=-1"),
        ("fixed_point", {"iterations": 2.0}, "iterations=2.0"),
        ("fixed_point", {"solver": "newton"}, "solver='newton' is not one of iterate, anderson, gradient"),
        ("fixed_point", {"tolerance": float("nan")}, "tolerance=nan"),
        ("negative_prompt", {"interpolation": 1.5}, "interpolation=1.5"),
        ("null_text", {"guidance_scale": 1.0}, "guidance_scale=1.0 uses no null embeddings"),
        ("null_text", {"guidance_scale": "7"}, "guidance_scale='7'"),
        ("null_text", {"schedule": "slow"}, "schedule='slow' is not one of fast, official"),
        ("null_text", {"inner_steps": 0}, "inner_steps=0"),
        ("null_text", {"learning_rate": 0}, "learning_rate=0"),
        ("null_text", {"early_stop": -1}, "early_stop=-1"),
        ("direct", {"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ("edit_friendly", {"eta": 0}, "eta=0 leaves the sampler without noise"),
        ("edit_friendly", {"eta": 1.5}, "eta=1.5"),
        ("edit_friendly", {"noise": torch.zeros(2, 3)}, r"noise of shape \(2, 3\) does not fit; give \(4, 2, 3\)"),
        ("bdia", {"gamma": 0.5}, "gamma=0.5"),
    ],
)
def test_a_setting_out_of_range_is_named(name, settings, answer):
    with pytest.raises(ValueError, match=answer):
        invert(gaussian(), pictures(), ladder(4), name, **settings)


def test_a_setting_of_another_method_is_refused():
    with pytest.raises(TypeError, match="iterations=3 is no setting of method='ddim'; it has alignment, callback"):
        invert(gaussian(), pictures(), ladder(4), "ddim", iterations=3)


@pytest.mark.parametrize("name", INVERSIONS)
def test_a_network_that_fails_is_named(name):
    bad = replace(gaussian(), network=lambda latents, timestep, embeddings: latents / 0)
    with pytest.raises(ValueError, match="infinite or not a number|stopped in step|not finite"):
        run(name, bad, pictures(), **QUICK.get(name, {}))
    wrong = replace(gaussian(), network=lambda latents, timestep, embeddings: latents[:, :1])
    with pytest.raises(ValueError, match=r"network returned \(\d, 1\)"):
        run(name, wrong, pictures(), **QUICK.get(name, {}))


def test_a_way_back_that_does_not_fit_is_refused():
    denoiser, start = linear(), pictures()
    inverted = invert(denoiser, start, ladder(4), "direct")
    with pytest.raises(ValueError, match="guidance_scale=5.0, but the inversion was made for 7.5"):
        regenerate(denoiser, inverted, ladder(4), 5.0)
    with pytest.raises(ValueError, match="use the same model, scheduler and steps"):
        regenerate(denoiser, inverted, ladder(5))
    with pytest.raises(ValueError, match="has 2 pictures, the denoiser prompts of 1"):
        regenerate(denoiser.part(0), inverted, ladder(4))
    with pytest.raises(ValueError, match="skip=4"):
        regenerate(denoiser, inverted, ladder(4), skip=4)
    with pytest.raises(ValueError, match="skip=1 is not possible after bdia"):
        regenerate(denoiser, invert(denoiser, start, ladder(4), "bdia"), ladder(4), skip=1)
    with pytest.raises(TypeError, match="inverted is a str; give what an inversion method returned"):
        regenerate(denoiser, "inverted", ladder(4))


def test_a_denoiser_of_wrong_parts_is_refused():
    good = torch.zeros(1, 2, 3)
    with pytest.raises(TypeError, match="network is a int and cannot be called"):
        Denoiser(5, good, good)
    with pytest.raises(TypeError, match="null_embeddings is NoneType"):
        Denoiser(lambda *a: None, good, None)
    with pytest.raises(ValueError, match=r"null_embeddings of shape \(1, 3, 3\) and source_embeddings of shape"):
        Denoiser(lambda *a: None, good, torch.zeros(1, 3, 3))
