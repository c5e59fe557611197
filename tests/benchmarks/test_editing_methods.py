from types import SimpleNamespace

import pytest
import torch
from editing import Bench
from editing_methods import DOCUMENTED, SETTINGS
from editors import Batch, Editors

from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.hub import resolve_model


STEPS = 4


@pytest.fixture(scope="module")
def editors() -> Editors:
    return Editors(resolve_model(), STEPS)


def batch(rows: slice = slice(0, 2)) -> Batch:
    pairs = EmojiScenes(objects=DEMO_OBJECTS).edit_pairs("colour", 2, 3)
    return Batch(
        pairs.source[rows], pairs.source_prompts[rows], pairs.target_prompts[rows], [0, 1][rows], pairs.target[rows]
    )


def main_of(method: str):
    return next(setting for setting in SETTINGS if setting.main and setting.method == method)


# steps of the inversion, passes of each sampling step; SDEdit walks 3 of 4 steps at strength .75
@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        ("No edit", 0, 0),
        ("DDIM inversion + CFG", STEPS + 2 * STEPS, 0),
        ("SDEdit", 2 * 3, 0),
        ("LEDITS++", STEPS + 2 * STEPS, 0),
        # 2 of 4 steps are guided (.6), the first of them without a gradient: nothing differs from the source yet
        ("Guide-and-Rescale", STEPS + 2 * STEPS + 2, 1),
        # source and edit with words, and the edit without them; a source that is sampled needs both as well
        ("Direct + P2P + blend", STEPS + 3 * STEPS, 0),
        ("DDIM + P2P", STEPS + 4 * STEPS, 0),
    ],
)
@torch.no_grad()
def test_every_method_is_charged_for_the_passes_it_makes(editors, method, forward, backward):
    editors.forward_passes = editors.backward_passes = 0
    images = main_of(method).run(editors, batch())
    assert images.shape == (2, 3, 64, 64) and images.abs().max() <= 1 + 1e-5
    assert (editors.forward_passes / 2, editors.backward_passes / 2) == (forward, backward)


@pytest.mark.parametrize("method", ["SDEdit", "DDIM inversion + CFG"])
@torch.no_grad()
def test_an_edit_does_not_depend_on_what_else_is_in_the_batch(editors, method):
    setting = main_of(method)
    both = setting.run(editors, batch())
    alone = setting.run(editors, batch(slice(1, 2)))
    assert torch.allclose(alone[0], both[1], atol=2e-3)


@torch.no_grad()
def test_one_inversion_serves_every_method_that_inverts(editors):
    given = batch()
    main_of("DDIM inversion + CFG").run(editors, given)
    editors.forward_passes = 0
    shared = main_of("Guide-and-Rescale").run(editors, given)
    assert editors.forward_passes == 2 * (2 * STEPS + 2)
    assert torch.equal(shared, main_of("Guide-and-Rescale").run(editors, batch()))


@torch.no_grad()
def test_ledits_leaves_the_network_as_it_was(editors):
    before = dict(editors.guide.unet.attn_processors)
    main_of("LEDITS++").run(editors, batch(slice(0, 1)))
    assert editors.guide.unet.attn_processors == before


def test_what_larger_models_get_is_what_the_pipelines_do_by_themselves():
    assert [setting.method for setting in DOCUMENTED] == [
        "DDIM inversion + CFG", "SDEdit", "LEDITS++", "Guide-and-Rescale",
    ]  # fmt: skip


def test_measures_are_remembered_until_anything_that_they_depend_on_changes(tmp_path):
    bench = object.__new__(Bench)
    bench.options = SimpleNamespace(cache=tmp_path)
    bench.facts = {"model": "abc", "count": 100}
    path = bench.file("noto colour", "DDIM inversion + CFG, scale 3.5")
    assert path.parent == tmp_path and bench.remembered(path) is None
    bench.remember(path, {"psnr": [1.0, float("inf")]})
    assert bench.remembered(path) == {"psnr": [1.0, float("inf")]}
    bench.facts = {"model": "abc", "count": 50}
    assert bench.remembered(path) is None


def test_no_two_settings_share_a_file(tmp_path):
    bench = object.__new__(Bench)
    bench.options = SimpleNamespace(cache=tmp_path)
    assert len({bench.file("noto colour", setting.name) for setting in SETTINGS}) == len(SETTINGS)
