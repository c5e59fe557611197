"""The package as a whole: what an import costs and gives, and what a wheel contains."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import diffusers
import pytest

import diffusers_ext


ROOT = Path(__file__).resolve().parent.parent


def fresh(code: str) -> str:
    """Runs code in a new interpreter and returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done.stdout


def library_imports(file: Path, depth: int) -> set[str]:
    """The top-level modules of the library that a file imports, from whatever line."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level in (0, depth):
            names = [f"diffusers_ext.{node.module}" if node.level else str(node.module)] if node.module else []
        else:
            names = []
        found |= {name.split(".")[1] for name in names if name.startswith("diffusers_ext.")}
    return found


# Components must be imported with the package, and these base classes of theirs are what that costs in diffusers itself
# (`ModelMixin` brings transformers, its solvers bring scipy). Everything here is measured beyond them.
BASE = (
    "import json, sys, time\nfrom diffusers import DPMSolverMultistepScheduler, ModelMixin, SchedulerMixin\n"
    "from diffusers import UniPCMultistepScheduler\n"
)


def test_import_brings_no_library_beyond_diffusers_and_no_pipelines():
    code = (
        BASE + "before = set(sys.modules)\nimport diffusers_ext\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    modules = json.loads(fresh(code))
    assert {"diffusers_ext", "diffusers_ext.schedulers", "diffusers_ext.models"} <= set(modules)
    assert not [name for name in modules if name.split(".")[0] not in ("diffusers_ext", "diffusers")]
    postponed = r"diffusers_ext\.(pipelines|inversion|guidance|steering|attention|training|data|cli|hub|demo)|diffusers\.pipelines"
    assert not [name for name in modules if re.match(postponed, name)]


def test_no_import_of_the_library_brings_gradio_or_torchvision():
    code = "import json, sys, diffusers_ext, diffusers_ext.cli, diffusers_ext.demos.editing\nprint(json.dumps(sorted(sys.modules)))"
    assert not {"gradio", "torchvision", "datasets", "training", "spaces", "benchmarks"} & set(json.loads(fresh(code)))


def test_import_costs_little_over_diffusers():
    # Processor time: that another process is busy, or the disk is cold, is not our cost.
    code = BASE + "start = time.process_time()\nimport diffusers_ext\nprint(time.process_time() - start)"
    assert float(fresh(code)) < 0.3


def test_every_public_name_resolves():
    for name in diffusers_ext.__all__:
        assert getattr(diffusers_ext, name) is not None
        assert name in dir(diffusers_ext)
    assert diffusers_ext.SchedulerMixin is diffusers.SchedulerMixin
    assert diffusers_ext.ModelMixin is diffusers.ModelMixin


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchPipeline"):
        _ = diffusers_ext.NoSuchPipeline


def test_version_is_that_of_the_metadata():
    assert re.fullmatch(r"\d+\.\d+\.\d+", diffusers_ext.__version__)
    assert "version = attr: diffusers_ext.__version__" in (ROOT / "setup.cfg").read_text()


def test_register_is_opt_in_idempotent_and_never_overwrites():
    output = fresh(
        "import diffusers, diffusers_ext\n"
        "assert not hasattr(diffusers, 'GuideAndRescalePipeline')\n"
        "names = diffusers_ext.register()\n"
        "assert names == diffusers_ext.register() and 'GuideAndRescalePipeline' in names\n"
        "assert diffusers.GuideAndRescalePipeline is diffusers_ext.GuideAndRescalePipeline\n"
        "diffusers.GuideAndRescalePipeline = theirs = type('Theirs', (), {})\n"
        "try:\n    diffusers_ext.register()\n"
        "except RuntimeError as error:\n    print(error)\n"
        "assert diffusers.GuideAndRescalePipeline is theirs\n"
    )
    assert "already has another `GuideAndRescalePipeline`" in output


def test_imports_inside_the_library_never_point_up():
    layers = {
        "atomic": 0, "imaging": 0, "metrics": 0, "data": 0, "schedulers": 0, "models": 0, "sheets": 0, "card_links": 0, "manifest": 1,
        "integrity": 2, "reports": 3, "attention": 3, "training": 4, "inversion": 4, "guidance": 4, "steering": 4,
        "pipelines": 5, "hub": 6, "steering_tasks": 7, "publishable": 2, "publishing": 3,
        "students": 7, "serving": 7, "demos": 7, "batching": 8, "commands": 9,
        "cli": 9,
    }  # fmt: skip
    package = ROOT / "diffusers_ext"
    wrong = []
    for file in package.rglob("*.py"):
        place = file.relative_to(package).with_suffix("").parts
        if place == ("__init__",):
            continue
        for name in library_imports(file, depth=len(place)):
            assert name in layers and place[0] in layers, f"give {name} and {place[0]} a layer here"
            if layers[name] > layers[place[0]]:
                wrong.append(f"{'/'.join(place)} imports {name}")
    assert not wrong


def test_nothing_is_unpickled_and_no_forbidden_library_is_imported():
    forbidden = re.compile(
        r"(?<!\.)torch\.load\(|pickle\.load|^\s*(?:import|from) (?:torchvision|gradio|datasets)\b|(?<![\w.])(?:eval|exec)\(",
        re.MULTILINE,
    )
    files = set((ROOT / "diffusers_ext").rglob("*.py"))
    found = {file for file in files if forbidden.search(file.read_text())}
    # Only what the Spaces are made of knows Gradio, and nothing else of the library imports that.
    assert found <= {ROOT / "diffusers_ext" / "serving" / name for name in ("app.py", "fields.py")}
    assert not [file for file in files if re.search(r"(?:from|import) \S*serving\.(?:app|fields)\b", file.read_text())]


def test_constraints_lie_inside_the_ranges_of_setup_cfg():
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins[requirement.name.lower().replace("_", "-")] = str(requirement.specifier).removeprefix("==")
    declared = re.findall(r"^    ([A-Za-z][\w-]*>=[\w.]+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert len(declared) > 12
    for line in declared:
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        # Gradio is installed for the Spaces only, which pin their own.
        if name != "gradio":
            assert requirement.specifier.contains(pins[name]), line


@pytest.mark.slow
def test_a_wheel_holds_the_typing_marker_and_the_data(tmp_path):
    # A copy, because a build leaves folders behind, and a stale one would hide a missing file.
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    source = tmp_path / "source"
    for name in listing.stdout.decode().split("\0"):
        if name.startswith(("diffusers_ext/", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE")):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source], check=True, timeout=300
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(source)) for path in (source / "diffusers_ext").rglob("*") if path.is_file()}
    assert "diffusers_ext/py.typed" in wanted and "diffusers_ext/data/sheets/noto.png" in wanted
    assert wanted <= names
    assert not [name for name in names if not name.startswith(("diffusers_ext/", "diffusers_ext-"))]
