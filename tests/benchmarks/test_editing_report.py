import torch
from editing_curves import COLOURS, curves, trusted
from editing_methods import DDIM, GUIDE, METHODS, OURS, PEERS, SDEDIT, SETTINGS
from editing_report import (
    cost_table,
    equal_success_table,
    few_table,
    front_table,
    paired_table,
    pareto_tables,
    save_small,
    task_table,
)
from PIL import Image
from word_methods import BLENDED


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


def cells(table: str, start: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def reached(method: str, rows: dict[str, dict[str, dict[str, float]]], success: float) -> bool:
    names = [setting.name for setting in SETTINGS if setting.method == method and setting.pairs is None]
    return max((rows[name]["success_judge"]["mean"] for name in names), default=0.0) >= success


def test_at_equal_success_the_method_that_keeps_most_is_bold():
    rows = rows_of({**dict.fromkeys(METHODS, 20.0), GUIDE: 25.0})
    table = equal_success_table({"noto colour": rows})
    head = cells(table, "pairs")
    kept = dict(zip(head, cells(table, "noto colour | 0.70"), strict=True))
    for method in head[2:]:
        wanted = "–" if not reached(method, rows, 0.7) else "**23.00**" if method == GUIDE else "18.00"
        assert kept[method] == wanted
    assert {GUIDE, SDEDIT, DDIM, BLENDED} <= set(head)


def test_a_success_out_of_reach_is_a_dash():
    rows = rows_of(dict.fromkeys(METHODS, 20.0))
    for setting in [setting for setting in SETTINGS if setting.method == DDIM][4:]:
        del rows[setting.name]  # .8 is left as its most; SDEdit gets to .9
    table = equal_success_table({"noto colour": rows})
    kept = dict(zip(cells(table, "pairs"), cells(table, "noto colour | 0.90"), strict=True))
    assert kept[DDIM] == "–" and kept[SDEDIT] == "**16.00**"


def only(points: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Some settings of methods at (success, PSNR outside), and nothing else."""
    rows = {}
    for method, places in points.items():
        own = [setting for setting in SETTINGS if setting.method == method and setting.pairs is None]
        for setting, (success, kept) in zip(own, places, strict=False):
            rows[setting.name] = {"success_judge": {"mean": success}, "psnr_outside": {"mean": kept}}
    return rows


def test_ours_are_set_against_the_best_peer_at_equal_success_and_at_equal_preservation():
    rows = only({
        DDIM: [(0.7, 24.0), (0.9, 20.0)], SDEDIT: [(0.95, 15.0)], BLENDED: [(0.85, 30.0)], GUIDE: [(0.7, 31.0)],
    })  # fmt: skip
    table = pareto_tables({"noto colour": rows})
    assert cells(table, "noto colour | 0.70")[2:] == [f"31.00 ({GUIDE})", f"24.00 ({DDIM})", "+7.00"]
    assert cells(table, "noto colour | 0.80")[2:] == [f"30.00 ({BLENDED})", f"22.00 ({DDIM})", "+8.00"]
    assert cells(table, "noto colour | 0.90")[2:] == ["–", f"20.00 ({DDIM})", "peers alone"]
    assert cells(table, "noto colour | 24.00")[2:] == [f"0.85 ({BLENDED})", f"0.70 ({DDIM})", "+0.15"]
    assert cells(table, "noto colour | 20.00")[2:] == [f"0.85 ({BLENDED})", f"0.90 ({DDIM})", "-0.05"]
    ahead = ("success 0.90", "success 0.95", "20.00 dB", "15.00 dB")
    assert table.endswith(f"Peers are ahead: {', '.join(f'noto colour at {place}' for place in ahead)}.")
    rows = only({DDIM: [(0.7, 24.0), (0.9, 20.0)], BLENDED: [(0.95, 30.0)]})
    assert pareto_tables({"noto colour": rows}).endswith("Peers are ahead: at none of these.")


def test_the_front_says_whose_each_setting_is():
    rows = only({DDIM: [(0.7, 24.0), (0.9, 20.0)], BLENDED: [(0.8, 30.0)]})
    lines = front_table({"noto colour": rows}).splitlines()[2:]
    assert [line.split("|")[3].strip() for line in lines] == ["ours", "peer"]
    assert DDIM in PEERS and BLENDED in OURS


def test_settings_of_few_pairs_are_compared_on_those_pairs_alone():
    few = next(setting for setting in SETTINGS if setting.pairs is not None)
    lead = next(setting.name for setting in SETTINGS if setting.method == BLENDED and setting.main)
    measured = {
        few.name: {"success_judge": [True, False], "psnr_outside": [20.0, 22.0]},
        lead: {"success_judge": [True, True, False], "psnr_outside": [25.0, 27.0, 90.0]},
    }
    row = cells(few_table({"noto colour": measured}), "noto colour")
    assert row[1:] == [few.name, "0.50 ± 0.50", "21.00 ± 1.00", "+0.50 ± 0.50", "+5.00 ± 0.00"]
    assert few_table({"noto colour": {lead: measured[lead]}}) == "None."


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
    lines = paired_table({"noto colour": measured}, GUIDE).splitlines()[2:]
    assert lines[0].count("+1.00 ± 0.00") == len(mains) - 1
    assert lines[2].count("-0.50 ± 0.50") == len(mains) - 1


def test_tables_have_a_row_for_every_setting():
    rows = rows_of(dict.fromkeys(METHODS, 20.0))
    assert len(task_table(rows).splitlines()) == len(SETTINGS) + 2
    cost = {"forward": 90, "backward": 0, "seconds": 1.0, "peak_megabytes": None}
    table = cost_table({setting.name: cost for setting in SETTINGS})
    assert len(table.splitlines()) == len(SETTINGS) + 2 and "| – |" in table
    assert len(cost_table({SETTINGS[0].name: cost}).splitlines()) == 3


def test_curves_show_every_method_that_was_measured_on_every_pair_in_its_colour():
    heights = {method: 18.0 + 1.5 * number for number, method in enumerate(METHODS)}
    sheet = curves({"noto colour": rows_of(heights)})
    colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert len(set(COLOURS.values())) == len(METHODS)
    for method in {setting.method for setting in SETTINGS if setting.pairs is None} & set(METHODS):
        wanted = bytes.fromhex(COLOURS[method][1:])
        # Lines that are averaged down lose a little of their colour.
        assert any(max(abs(a - b) for a, b in zip(wanted, colour, strict=True)) < 16 for colour in colours), method


def test_a_sheet_that_is_too_large_is_saved_in_fewer_colours(tmp_path):
    noise = torch.randint(256, (300, 300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "sheet.png"
    save_small(Image.fromarray(noise.numpy()), path, limit=100_000)
    assert path.stat().st_size <= 100_000
    save_small(Image.new("RGB", (50, 50), "red"), path)
    with Image.open(path) as saved:
        assert saved.mode == "RGB"
