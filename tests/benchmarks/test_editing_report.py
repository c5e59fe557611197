import torch
from editing_methods import DDIM, GUIDE, METHODS, SETTINGS
from editing_report import cost_table, curves, equal_success_table, paired_table, save_small, task_table, trusted
from PIL import Image


MEASURES = ("psnr_outside", "ssim_outside", "features_outside", "psnr", "ssim", "features")
FLAGS = ("reached_judge", "success_judge", "reached_second", "success_second")


def rows_of(heights: dict[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """Every setting at success .5, .6, ..., with a preservation that falls from its method's height."""
    rows, seen = {}, dict.fromkeys(METHODS, 0)
    for setting in SETTINGS:
        step = seen.get(setting.method, 0)
        seen[setting.method] = step + 1
        row = {name: {"mean": heights.get(setting.method, 30.0) - step, "error": 0.1} for name in MEASURES}
        row |= {name: {"mean": round(0.5 + 0.1 * step, 2), "error": 0.05} for name in FLAGS}
        rows[setting.name] = row
    return rows


def test_at_equal_success_the_method_that_keeps_most_is_bold():
    table = equal_success_table({"noto colour": rows_of({**dict.fromkeys(METHODS, 20.0), GUIDE: 25.0})})
    line = next(line for line in table.splitlines() if "| 0.70 |" in line)
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["18.00", "18.00", "18.00", "**23.00**", "+5.00"]


def test_a_success_out_of_reach_is_a_dash():
    rows = rows_of(dict.fromkeys(METHODS, 20.0))
    for setting in [setting for setting in SETTINGS if setting.method == DDIM][4:]:
        del rows[setting.name]  # .8 is left as its most; the others get to .9 and more
    table = equal_success_table({"noto colour": rows})
    line = next(line for line in table.splitlines() if "| 0.90 |" in line)
    assert line.split("|")[4].strip() == "–" and line.split("|")[3].strip() == "**16.00**"


def test_the_held_out_hand_is_judged_by_the_judge_that_has_seen_it():
    assert trusted("noto object") == "success_judge" and trusted("fxemoji object") == "success_second"


def test_differences_are_those_of_pictures_and_not_of_means():
    mains = [setting for setting in SETTINGS if setting.main and setting.method in METHODS]
    measured = {
        setting.name: {
            "psnr_outside": [10.0 + (setting.method == GUIDE), 30.0 + (setting.method == GUIDE)],
            "psnr": [1.0, 1.0],
            "success_judge": [True, setting.method != GUIDE],
        }
        for setting in mains
    }
    lines = paired_table({"noto colour": measured}).splitlines()[2:]
    assert lines[0].count("+1.00 ± 0.00") == 3
    assert lines[2].count("-0.50 ± 0.50") == 3


def test_tables_have_a_row_for_every_setting():
    rows = rows_of(dict.fromkeys(METHODS, 20.0))
    assert len(task_table(rows).splitlines()) == len(SETTINGS) + 2
    cost = {"forward": 90, "backward": 0, "seconds": 1.0, "peak_megabytes": None}
    table = cost_table({setting.name: cost for setting in SETTINGS})
    assert len(table.splitlines()) == len(SETTINGS) + 2 and "| – |" in table


def test_curves_show_every_method_in_its_colour():
    from editing_report import COLOURS

    heights = {method: 18.0 + 3.0 * number for number, method in enumerate(METHODS)}
    sheet = curves({"noto colour": rows_of(heights)})
    colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    for colour in COLOURS.values():
        assert tuple(bytes.fromhex(colour[1:])) in colours


def test_a_sheet_that_is_too_large_is_saved_in_fewer_colours(tmp_path):
    noise = torch.randint(256, (300, 300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "sheet.png"
    save_small(Image.fromarray(noise.numpy()), path, limit=100_000)
    assert path.stat().st_size <= 100_000
    save_small(Image.new("RGB", (50, 50), "red"), path)
    with Image.open(path) as saved:
        assert saved.mode == "RGB"
