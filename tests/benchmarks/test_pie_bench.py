"""PIE-Bench's files, measures and runs, on a data set of four small pictures and tiny networks."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pie_bench
import pytest
import torch
from common import ROOT
from pie_data import EDITING_TYPES, decode_mask, read_entries, without_brackets
from pie_measures import ClipScore, Measures, StructureDistance, pixels
from pie_methods import METHODS, Editors
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTModel

from tests.helpers.tiny_models import TEXT_WIDTH, VOCABULARY_SIZE, tiny_stable_diffusion, tiny_tokenizer


SIDE = 32
# Rows 8 to 15, columns 4 to 19.
RUNS = [number for row in range(8, 16) for number in (row * SIDE + 4, 16)]


def entry(**changed):
    return {
        "image_path": "0_random_140/000000000000.png",
        "original_prompt": "a [cat]",
        "editing_prompt": "a [dog]",
        "editing_instruction": "make it a dog",
        "editing_type_id": "0",
        "blended_word": "cat dog",
        "mask": RUNS,
        **changed,
    }


@pytest.fixture
def data(tmp_path):
    """Four edits of three types in the layout of PIE-Bench."""
    folder = tmp_path / "PIE-Bench_v1"
    noise = np.random.default_rng(0)
    entries = {
        "000000000000": entry(),
        "000000000001": entry(image_path="0_random_140/000000000001.png", blended_word="", mask=[]),
        "111000000000": entry(
            image_path="1_change_object_80/1_artificial/1_animal/111000000000.png", editing_type_id="1",
            editing_prompt="a [red] cat", original_prompt="a cat", blended_word="cat cat",
        ),
        "922000000003": entry(
            image_path="9_change_style_80/922000000003.png", editing_type_id="9", mask=[0, SIDE * SIDE],
            blended_word="sky sky",
        ),
    }  # fmt: skip
    for item in entries.values():
        path = folder / "annotation_images" / item["image_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    write(folder, entries)
    return folder


def write(folder, entries) -> None:
    (folder / "mapping_file.json").write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a Stable Diffusion, a ViT and a CLIP, all tiny and random."""
    folder = tmp_path_factory.mktemp("networks")
    tiny_stable_diffusion().save_pretrained(folder / "sd")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        vit = ViTConfig(image_size=SIDE, patch_size=8, **sizes)
        ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "dino")
        ends = {"bos_token_id": VOCABULARY_SIZE - 2, "eos_token_id": VOCABULARY_SIZE - 1}
        text = {"vocab_size": VOCABULARY_SIZE, "max_position_embeddings": 16, **ends, **sizes}
        vision = {"image_size": 16, "patch_size": 8, **sizes}
        clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH)
        CLIPModel(clip).save_pretrained(folder / "clip")
    tiny_tokenizer().save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "clip")
    return SimpleNamespace(sd=str(folder / "sd"), dino=str(folder / "dino"), clip=str(folder / "clip"))


def arguments(data, networks, output, *more: str) -> list[str]:
    return [
        "--data",
        str(data),
        "--model",
        networks.sd,
        "--steps",
        "2",
        "--device",
        "cpu",
        "--output",
        str(output),
        *more,
    ]


# Masks


def test_runs_of_ones_become_a_mask_row_by_row():
    expected = [[0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]]
    assert decode_mask([1, 2, 7, 3], 4, 3, border=False).tolist() == [[bool(x) for x in row] for row in expected]


def test_the_outermost_pixels_are_always_part_of_a_mask():
    frame = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]
    assert decode_mask([12, 1], 5, 4).astype(int).tolist() == frame


def test_an_empty_mask_is_a_frame_and_a_full_one_is_full():
    empty = decode_mask([])
    assert empty.shape == (512, 512) and empty.sum() == 4 * 511 and not empty[1:-1, 1:-1].any()
    assert decode_mask([], border=False).sum() == 0
    assert decode_mask([0, 512 * 512]).all()


def test_what_a_run_has_beyond_the_last_pixel_is_cut_off():
    assert decode_mask([10, 100], 4, 3, border=False).sum() == 2


@pytest.mark.parametrize(
    ("runs", "message"),
    [([3], "no pairs"), ([12, 1], "4 x 3 pixels, 12 in all"), ([-1, 2], "from -1"), ([0, -2], "run of -2")],
)
def test_a_mask_that_does_not_fit_is_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(runs, 4, 3)


# Files


def test_entries_are_read_in_order_with_words_masks_and_prompts(data):
    first, second, third, last = read_entries(data)
    assert (first.key, first.source_prompt, first.prompt) == ("000000000000", "a cat", "a dog")
    assert first.blended_words == ("cat", "dog") and second.blended_words is None
    assert first.mask(SIDE, SIDE)[8:16, 4:20].all() and first.mask(SIDE, SIDE)[1:8, 1:-1].sum() == 0
    assert third.path.is_file() and last.mask(SIDE, SIDE).all()


def test_brackets_go_and_leave_no_doubled_space():
    assert without_brackets("a [rusty] bicycle [] on [the road]") == "a rusty bicycle on the road"


def test_types_of_edits_are_chosen_by_number_or_name_and_limited_each(data):
    assert [e.key for e in read_entries(data, ["1", "change style"])] == ["111000000000", "922000000003"]
    assert [e.key for e in read_entries(data, limit=1)] == ["000000000000", "111000000000", "922000000003"]
    with pytest.raises(ValueError, match="no type of edits 'colour'; use 0 .random., 1 .change object.*"):
        read_entries(data, ["colour"])
    with pytest.raises(ValueError, match="has no edit of the types 4 .change content."):
        read_entries(data, ["4"])


def test_a_folder_of_something_else_says_what_it_must_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold mapping_file.json and annotation_images/"):
        read_entries(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no entries"),
        ("{}", "holds no entries"),
        ('{"a": 3}', "entry 'a' of .* is no object"),
    ],
)
def test_a_mapping_file_that_cannot_be_used_says_why(data, content, message):
    (data / "mapping_file.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_entries(data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"original_prompt": None}, "entry 'x' of .* has original_prompt=None; it must be a text"),
        ({"editing_type_id": "12"}, "editing_type_id='12'; it must be '0' to '9'"),
        ({"editing_type_id": 1}, "editing_type_id=1; it must be a text"),
        ({"mask": "0 4"}, "mask that is no list of whole numbers"),
        ({"mask": [0, 1.5]}, "mask that is no list of whole numbers"),
        ({"blended_word": "cat"}, "blended_word='cat'; it must be two words"),
        ({"image_path": "../elsewhere.png"}, "leads out of annotation_images/"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named(data, changed, message):
    write(data, {"x": entry(**changed)})
    with pytest.raises(ValueError, match=message):
        read_entries(data)


def test_a_key_that_leads_out_of_the_results_is_refused(data):
    write(data, {"../x": entry()})
    with pytest.raises(ValueError, match="cannot be that of a file"):
        read_entries(data)


def test_a_picture_that_is_not_there_is_named(data):
    write(data, {"x": entry(image_path="0_random_140/none.png")})
    with pytest.raises(FileNotFoundError, match="the picture of x is not there"):
        read_entries(data)


# Measures


def gray(value: int, side: int = SIDE) -> Image.Image:
    return Image.new("RGB", (side, side), (value,) * 3)


def test_what_is_masked_counts_as_equal_and_dilutes_the_error():
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, : SIDE // 4] = True
    changed = np.full((SIDE, SIDE, 3), 100, np.uint8)
    changed[mask] = 7  # must not be seen
    changed[~mask] += 51
    found = Measures()(gray(100), Image.fromarray(changed), mask, "")
    assert found["mse"] == pytest.approx(0.75 * 0.2**2, rel=1e-4)
    assert found["psnr"] == pytest.approx(-10 * math.log10(0.75 * 0.2**2), rel=1e-4)
    assert 0 < found["ssim"] < 1


def test_an_edit_inside_of_its_mask_leaves_the_outside_perfect():
    mask = decode_mask(RUNS, SIDE, SIDE)
    changed = np.full((SIDE, SIDE, 3), 100, np.uint8)
    changed[mask] = 200
    found = Measures()(gray(100), Image.fromarray(changed), mask, "")
    assert found["psnr"] == math.inf and found["mse"] == 0 and found["ssim"] == pytest.approx(1)


def test_a_mask_of_everything_has_no_outside():
    found = Measures()(gray(100), gray(110), np.ones((SIDE, SIDE), bool), "")
    assert all(math.isnan(found[name]) for name in ("psnr", "mse", "ssim"))


def test_results_of_another_size_are_refused():
    with pytest.raises(ValueError, match="differ in size"):
        Measures()(gray(100), gray(100, 16), np.ones((SIDE, SIDE), bool), "")


def test_lpips_gets_black_where_the_mask_is_and_pictures_from_minus_one_to_one(monkeypatch):
    seen = {}

    class Lpips(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            seen["net"] = net

        def forward(self, edited: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
            seen["pictures"] = edited, source
            return torch.full((1, 1, 1, 1), 0.25)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Lpips))
    mask = decode_mask(RUNS, SIDE, SIDE)
    assert Measures()(gray(255), gray(51), mask, "")["lpips"] == 0.25
    edited, source = seen["pictures"]
    assert seen["net"] == "squeeze" and edited.shape == (1, 3, SIDE, SIDE)
    outside = torch.from_numpy(~mask)
    torch.testing.assert_close(source[0, 0], torch.where(outside, 1.0, -1.0))
    torch.testing.assert_close(edited[0, 0], torch.where(outside, -0.6, -1.0))


def test_what_is_not_given_is_left_out_and_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    measures = Measures()
    assert measures.names == ["psnr", "mse", "ssim"]
    assert set(measures.left_out) == {"structure", "clip", "clip_edited", "lpips"}
    assert set(measures(gray(1), gray(2), np.zeros((SIDE, SIDE), bool), "")) == set(measures.names)


def test_structure_is_the_self_similarity_of_the_last_keys(networks):
    distance = StructureDistance(networks.dino)
    noise = np.random.default_rng(1).integers(0, 255, (2, SIDE, SIDE, 3), dtype=np.uint8)
    first, second = (Image.fromarray(values) for values in noise)

    def by_hand(values: np.ndarray) -> torch.Tensor:
        scaled = (values - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        states = distance.vit(torch.from_numpy(scaled).float().permute(2, 0, 1)[None], output_hidden_states=True)
        # transformers has had two names for the keys
        keys_of, norm = (
            [part for name, part in distance.vit.named_modules() if name.endswith(ends)][-1]
            for ends in ((".k_proj", ".key"), ".layernorm_before")
        )
        keys = keys_of(norm(states.hidden_states[-2]))[0]
        lengths = keys.norm(dim=1)
        return keys @ keys.T / torch.outer(lengths, lengths)

    with torch.no_grad():
        expected = (by_hand(noise[0]) - by_hand(noise[1])).square().mean()
    assert distance(first, second) == pytest.approx(float(expected), rel=1e-4) and expected > 0
    assert distance(first, first) == 0
    # Larger pictures are scaled to the side of the network.
    assert distance(first.resize((64, 64), Image.Resampling.NEAREST), first) == pytest.approx(0, abs=1e-6)


def test_clip_is_a_hundredfold_cosine_and_sees_only_the_edited_part_of_the_second(networks):
    score = ClipScore(networks.clip)
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
    values = score.processor(images=[picture], return_tensors="pt").pixel_values
    words = tiny_tokenizer()(["a dog"], return_tensors="pt")
    with torch.no_grad():
        seen, read = score.model.get_image_features(values), score.model.get_text_features(**words)
    a, b = (x if isinstance(x, torch.Tensor) else x.pooler_output for x in (seen, read))
    cosine = float(torch.nn.functional.cosine_similarity(a, b))
    assert score(picture, "a dog") == pytest.approx(max(100 * cosine, 0), abs=1e-3)

    measures, given = Measures(clip=networks.clip), []
    measures.clip = lambda image, text: given.append((image, text)) or 1.0
    mask = decode_mask(RUNS, SIDE, SIDE)
    measures(picture, picture, mask, "a dog")
    (whole, _), (part, text) = given
    assert text == "a dog" and whole is picture
    kept = np.asarray(part)
    assert (kept[mask] == np.asarray(picture)[mask]).all() and not kept[~mask].any()


def test_prompts_longer_than_clip_reads_are_cut(networks):
    assert ClipScore(networks.clip)(gray(9), "a dog " * 50) >= 0


def test_pixels_range_from_minus_one_to_one():
    assert pixels(gray(0)).unique().item() == -1 and pixels(gray(255)).unique().item() == 1


# Runs


@pytest.mark.parametrize("name", METHODS)
def test_every_method_edits_a_picture_of_another_size_than_the_models(name, data, networks):
    editors = Editors(networks.sd, 3, "cpu")
    edited = editors(METHODS[name], read_entries(data)[0], gray(90, 48))
    assert edited.image.size == (48, 48) and edited.forward_passes >= 3
    assert (edited.backward_passes > 0) == (name.startswith(("null-text", "guide")))
    assert edited.blended == (METHODS[name].prompt_to_prompt == "blended" and METHODS[name].inversion is not None)


def test_words_that_are_not_in_the_prompts_are_left_alone(data, networks):
    editors = Editors(networks.sd, 2, "cpu")
    method = METHODS["direct+p2p"]
    for item, blended in zip(read_entries(data), (True, False, True, False), strict=True):
        controller, found = editors.controller(method, item)
        assert found == blended and (controller.local_blend is not None) == blended
    controller, _ = editors.controller(method, read_entries(data)[2])
    assert controller.weights.unique().tolist() == [1.0, 2.0]


def test_a_run_writes_pictures_tables_and_goes_on_where_it_was(data, networks, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results"
    methods = ["ddim", "direct+p2p", "guide-and-rescale"]
    given = arguments(data, networks, output, "--methods", *methods)
    assert pie_bench.main([*given, "--limit", "1"]) == 0
    assert len(list(output.glob("*/*.png"))) == len(list(output.glob("*/*.json"))) == 3 * 3

    made = []
    edit = Editors.__call__
    monkeypatch.setattr(Editors, "__call__", lambda self, *rest: made.append(rest[1].key) or edit(self, *rest))
    assert pie_bench.main(given) == 0
    assert made == ["000000000001"] * 3

    result = json.loads((output / "results.json").read_text())
    assert list(result["tables"]) == ["all", "0", "1", "9"] and list(result["tables"]["all"]) == methods
    row = result["tables"]["all"]["direct+p2p"]
    # The mask of the last entry covers everything.
    assert row["pictures"] == 4 and row["psnr"]["pictures"] == 3
    records = [json.loads(path.read_text())["measures"] for path in sorted((output / "direct+p2p").glob("*.json"))]
    assert row["mse"]["mean"] == pytest.approx(np.mean([r["mse"] for r in records[:3]]) * 1e4, rel=1e-3)
    assert records[3]["psnr"] is None and result["tables"]["9"]["ddim"]["psnr"]["mean"] is None
    assert result["words_not_in_prompts"] == ["922000000003"]
    text = (output / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert "Left out: CLIP, since no --clip was given." in text and "## 1. change object" in text
    assert text.count("| direct+p2p |") == 4

    # Measures that are asked for later need no new pictures; other steps do.
    made.clear()
    judges = ["--dino", networks.dino, "--clip", networks.clip]
    assert pie_bench.main([*given, *judges]) == 0
    assert made == []
    table = json.loads((output / "results.json").read_text())["tables"]["9"]["guide-and-rescale"]
    assert table["structure"]["mean"] > 0 and table["clip"]["mean"] is not None
    assert pie_bench.main([*given, "--steps", "1", "--limit", "1", "--methods", "ddim"]) == 0
    assert len(made) == 3


def test_a_record_that_was_cut_off_is_made_again(data, networks, tmp_path):
    given = arguments(data, networks, tmp_path / "out", "--methods", "ddim", "--limit", "1", "--categories", "0")
    assert pie_bench.main(given) == 0
    (path,) = (tmp_path / "out" / "ddim").glob("*.json")
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:40])
    assert pie_bench.main(given) == 0
    assert json.loads(path.read_text())["measures"] == whole["measures"]


def test_one_picture_that_fails_does_not_stop_the_others(data, networks, tmp_path, monkeypatch):
    edit = Editors.__call__

    def breaks(self, method, item, picture):
        if item.key == "000000000001":
            raise ValueError("its loss is nan")
        return edit(self, method, item, picture)

    monkeypatch.setattr(Editors, "__call__", breaks)
    given = arguments(data, networks, tmp_path / "out", "--methods", "ddim")
    assert pie_bench.main(given) == 1
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["failed"] == [{"method": "ddim", "key": "000000000001", "why": "its loss is nan"}]
    assert result["tables"]["all"]["ddim"]["pictures"] == 3
    assert "* ddim, 000000000001: its loss is nan" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: (data / "mapping_file.json").unlink(), "is no folder of PIE-Bench"),
        (lambda data: write(data, {"x": entry(mask=[SIDE * SIDE, 5])}), "the mask of x does not fit"),
        (
            lambda data: gray(9, 10).save(data / "annotation_images" / entry()["image_path"]),
            "has 10 x 10 pixels; 11 on",
        ),
        (lambda data: shutil.copy(ROOT / "setup.cfg", data / "annotation_images" / entry()["image_path"]), "picture"),
    ],
)
def test_a_wrong_file_is_one_sentence_and_exit_code_2(data, networks, tmp_path, capsys, change, message):
    change(data)
    assert pie_bench.main(arguments(data, networks, tmp_path / "out", "--methods", "ddim")) == 2
    said = capsys.readouterr().err
    assert said.startswith("pie_bench: ") and message in said and said.count("\n") == 1


def test_a_model_or_judge_that_is_not_there_is_said(data, networks, tmp_path, capsys):
    given = arguments(data, networks, tmp_path / "out")
    assert pie_bench.main([*given, "--model", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert pie_bench.main([*given, "--clip", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_settings_out_of_range_are_refused_before_anything_is_loaded(data, networks, tmp_path, capsys):
    for wrong in (["--limit", "0"], ["--steps", "0"], ["--methods", "magic"]):
        with pytest.raises(SystemExit) as stopped:
            pie_bench.main([*arguments(data, networks, tmp_path / "out"), *wrong])
        assert stopped.value.code == 2


def test_all_ten_types_of_edits_are_known():
    assert list(EDITING_TYPES) == [str(number) for number in range(10)]
