"""Whether a folder can be published as a Hub repository: what it is, every file it may hold, and all that is wrong with it.

The rule is a list of what belongs there, not of what does not: a file that no loader and no card asks for (a log, a token, the
state of an optimizer) is found without anyone having thought of it.
"""

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
import yaml
from safetensors import SafetensorError, safe_open

from .card_links import local_links, with_source_links
from .manifest import INDEX_NAME, MANIFEST_NAME, DamagedFileError, first_line, read_json_object, verify_manifest


CARD_NAME = "README.md"
MAX_FILE_BYTES = 50 * 10**9  # of one file on the Hub
MAX_SPACE_BYTES = 10**9  # of a Space's repository; models belong into repositories of their own
MAX_PICTURE_BYTES = 10 * 10**6  # a card is read on telephones
# Security advisories for earlier ones: server-side request forgery by the file route, state that grows with each visitor.
MIN_GRADIO = (6, 25)

_ROOT = (CARD_NAME, "LICENSE*", "NOTICE*", ".gitattributes", "*.png", "*.jpg", "*.jpeg", "*.webp", "*.svg")
_COMPONENT = ("*.json", "*.safetensors", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model")
_SPACE: tuple[str, ...] = (*_ROOT, "*.py", "requirements.txt", "packages.txt", "examples/*", "assets/*")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5", ".npy", ".joblib")
# The file that says what a repository is, in the order in which it is looked for.
_KINDS = {INDEX_NAME: "pipeline", "scheduler_config.json": "scheduler", "config.json": "model", "pipeline.py": "shim"}
SAMPLER = "scheduler/scheduler_config.json"
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n(.*)", re.DOTALL)


class UnpublishableError(ValueError):
    """A folder that cannot be published; `problems` lists one sentence for each reason."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        super().__init__(f"{folder} cannot be published: {'; '.join(problems)}")
        self.problems = problems


@dataclass(frozen=True)
class Publishable:
    """A folder that was found fit to be published.

    Attributes:
        folder (`pathlib.Path`): The folder.
        kind (`str`): `"pipeline"`, `"model"`, `"scheduler"`, `"shim"` (a `pipeline.py` for `custom_pipeline=`) or `"space"`.
        sizes (`dict[str, int]`): Bytes of each file, by its path in the repository.
        remarks (`tuple[str, ...]`): What works but could be better, one sentence each; all are about links of the card.
        replaced (`dict[str, bytes]`): What is sent instead of a file of the folder.
    """

    folder: Path
    kind: str
    sizes: dict[str, int]
    remarks: tuple[str, ...] = ()
    replaced: dict[str, bytes] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())


def check_publishable(
    folder: str | os.PathLike[str], *, space: bool = False, source_url: str | None = None
) -> Publishable:
    """Checks a folder that shall become a Hub repository, and finds everything that is wrong with it at once.

    The card must have front matter with a licence and say something; its pictures must be there. Weights must be whole
    safetensors, and agree with the manifest if there is one. A `model_index.json` must name a class of diffusers whose
    components are all of diffusers and transformers, so that it loads without this package, or a pipeline of this package. Every
    other file must be one that such a repository has.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        space (`bool`, *optional*, defaults to `False`): Whether it is a Gradio Space.
        source_url (`str`, *optional*):
            Address of the files of the project that the folder is from, such as `https://github.com/me/project/blob/main`. Links
            of the card that lead out of the folder lead there in what is sent; by default they are sent as they are.

    Returns:
        [`Publishable`]: The files, and what could be better.

    Raises:
        UnpublishableError: If anything is wrong; the message says all of it.
        ValueError: If it is not a folder, or `source_url` no address or the folder in no git checkout.

    Example:
        ```python
        from diffusers_ext.publishable import check_publishable

        print(check_publishable("pipelines/emoji-scenes-64").kind)
        ```
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"folder={str(folder)!r} is not a folder; name the one that shall become the repository")
    problems: list[str] = []
    files = dict(_files(folder, problems))
    kind = "space" if space else next((kind for name, kind in _KINDS.items() if name in files), "")
    if not kind:
        names = ", ".join(_KINDS)
        cure = "; with --space it is taken for a Space" if "app.py" in files else ""
        raise UnpublishableError(folder, [f"none of {names} is in it, so nothing could be loaded from it{cure}"])
    remarks = _check_card(folder, kind, files, problems)
    if kind == "space":
        _check_space(folder, files, problems)
        allowed: tuple[str, ...] = _SPACE
    else:
        allowed = _check_repository(folder, kind, files, problems)
    _check_files(folder, files, allowed, problems)
    if problems:
        raise UnpublishableError(folder, problems)
    sizes = dict(sorted(files.items()))
    if source_url is None:
        return Publishable(folder, kind, sizes, tuple(remarks))
    text = (folder / CARD_NAME).read_text(encoding="utf-8")
    card = with_source_links(text, folder, files, source_url).encode()
    return Publishable(folder, kind, {**sizes, CARD_NAME: len(card)}, replaced={CARD_NAME: card})


def _files(folder: Path, problems: list[str]) -> Iterator[tuple[str, int]]:
    """Path in the repository and size of each file."""
    for parent, folders, names in os.walk(folder):
        # Python writes them beside an app that was tried out; git and the Hub ignore them alike.
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            path = Path(parent, name)
            inside = path.relative_to(folder).as_posix()
            if path.is_symlink():
                problems.append(f"{inside} is a link: put the file itself there")
            elif path.is_file():
                yield inside, path.stat().st_size
            else:
                problems.append(f"{inside} is not a regular file: remove it")
        for name in folders:
            if Path(parent, name).is_symlink():
                problems.append(
                    f"{Path(parent, name).relative_to(folder).as_posix()} is a link: put the folder itself there"
                )


def _check_files(folder: Path, files: dict[str, int], allowed: tuple[str, ...], problems: list[str]) -> None:
    for name, size in files.items():
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in _PICKLES:
            problems.append(f"{name} may be a pickle, which runs code when it is read: save it as safetensors")
        elif not any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in allowed):
            problems.append(f"{name} does not belong into such a repository: remove it")
        elif size == 0:
            problems.append(f"{name} is empty: write it again or remove it")
        elif size > MAX_FILE_BYTES:
            problems.append(f"{name} has {size / 1e9:.0f} GB, the Hub takes 50: save it in shards (max_shard_size)")
        elif suffix in _PICTURES and size > MAX_PICTURE_BYTES:
            problems.append(f"{name} has {size / 1e6:.0f} MB: scale the picture down to 10 or less")
        elif suffix == ".safetensors":
            try:
                with safe_open(folder / name, framework="np") as weights:
                    weights.keys()
            except (SafetensorError, OSError) as error:
                problems.append(f"{name} is damaged ({first_line(error)}): save it again")


def _check_repository(folder: Path, kind: str, files: dict[str, int], problems: list[str]) -> tuple[str, ...]:
    """Checks what is not a Space, and says which files belong there."""
    if kind == "shim":
        problems.extend(_shim_problems(folder / "pipeline.py"))
        return (*_ROOT, "pipeline.py")
    about = INDEX_NAME if kind == "pipeline" else "config.json" if kind == "model" else "scheduler_config.json"
    try:
        config = read_json_object(folder / about)
        verify_manifest(folder)
    except DamagedFileError as error:
        problems.append(str(error).replace(f"{folder}{os.sep}", ""))
        return (*_ROOT, *_COMPONENT, *(f"*/{pattern}" for pattern in _COMPONENT))
    if kind == "scheduler":
        problems.extend(_class_problems(config, about, ("Scheduler",)))
        return (*_ROOT, about)
    if kind == "model":
        problems.extend(_class_problems(config, about, ()))
        problems.extend(_weight_problems(files, ""))
        # a distilled network may say what samples it
        if SAMPLER in files:
            try:
                problems.extend(_class_problems(read_json_object(folder / SAMPLER), SAMPLER, ("Scheduler",)))
            except DamagedFileError as error:
                problems.append(str(error).replace(f"{folder}{os.sep}", ""))
        return (*_ROOT, MANIFEST_NAME, SAMPLER, *_COMPONENT)
    components = _check_index(config, files, problems)
    return (*_ROOT, INDEX_NAME, MANIFEST_NAME, *(f"{name}/{pattern}" for name in components for pattern in _COMPONENT))


def _class_problems(config: dict[str, Any], about: str, endings: tuple[str, ...]) -> Iterator[str]:
    name = config.get("_class_name")
    if not isinstance(name, str) or (endings and not name.endswith(endings)):
        yield f"_class_name={name!r} in {about} is not the name of a class: save it again with save_pretrained"
    if "auto_map" in config:
        yield f"{about} asks for code from the repository (auto_map): publish a class of diffusers or of this package"


def _check_index(index: dict[str, Any], files: dict[str, int], problems: list[str]) -> list[str]:
    """Checks a `model_index.json`; gives the components that the repository holds."""
    from . import _LAZY

    declared = index.get("_class_name")
    ours = isinstance(declared, str) and declared in _LAZY and declared.endswith("Pipeline")
    if not ours and not (isinstance(declared, str) and hasattr(diffusers, declared)):
        problems.append(
            f"_class_name={declared!r} in {INDEX_NAME} is a pipeline neither of diffusers nor of this package, so that "
            "nobody could load it: publish one of those"
        )
    components = []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or value[0] is None:
            continue
        components.append(name)
        library = str(value[0])
        if library not in ("diffusers", "transformers") and not (ours and library.startswith("diffusers_ext.")):
            problems.append(
                f"{name} in {INDEX_NAME} is a {value[1]} of {library}, which stock diffusers does not load: save a component of "
                "diffusers there, and publish a scheduler of another package in a repository of its own"
            )
        inside = {path for path in files if path.startswith(f"{name}/")}
        if not inside:
            problems.append(f"the folder {name} is missing, though {INDEX_NAME} lists it: save the pipeline again")
        elif f"{name}/config.json" in inside:
            problems.extend(_weight_problems(files, f"{name}/"))
    return components


def _weight_problems(files: dict[str, int], prefix: str) -> Iterator[str]:
    inside = [name for name in files if name.startswith(prefix) and name.count("/") == prefix.count("/")]
    if not any(name.endswith(".safetensors") for name in inside):
        yield f"{prefix or 'the folder/'} has no weights in safetensors: save it again with save_pretrained"
    for name in inside:
        if match := re.search(r"-(\d{5})-of-(\d{5})(?=\.)", name):
            shards = [name.replace(match[0], f"-{i:05d}-of-{match[2]}") for i in range(1, int(match[2]) + 1)]
            if missing := [shard for shard in shards if shard not in files]:
                yield f"{missing[0]} is missing beside {name}: save it again"
                return


def _shim_problems(path: Path) -> Iterator[str]:
    """A shim is loaded with `trust_remote_code=True`: whoever reads it must see at a glance that it only re-exports."""
    from . import _LAZY

    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        yield f"pipeline.py is not Python ({first_line(error)})"
        return
    code = [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    names = [
        alias.name
        for node in code
        if isinstance(node, ast.ImportFrom) and node.module == "diffusers_ext" and not node.level
        for alias in node.names
    ]
    if len(code) != 1 or len(names) != 1 or names[0] not in _LAZY or not names[0].endswith("Pipeline"):
        yield "pipeline.py is more or less than one line `from diffusers_ext import SomePipeline`"


def _check_card(folder: Path, kind: str, files: dict[str, int], problems: list[str]) -> list[str]:
    """Checks README.md; gives what could be better in it."""
    if CARD_NAME not in files:
        problems.append(
            f"{CARD_NAME} is missing: write a card that says what this is, with front matter and a licence"
        )
        return []
    try:
        match = _FRONT_MATTER.match((folder / CARD_NAME).read_text(encoding="utf-8"))
        facts = yaml.safe_load(match[1]) if match else None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{CARD_NAME} cannot be read ({first_line(error)}): correct its front matter")
        return []
    if not match or not isinstance(facts, dict):
        problems.append(f"{CARD_NAME} has no front matter: begin it with a block of YAML between two lines of ---")
        return []
    licence = facts.get("license")
    if not isinstance(licence, str) or not re.fullmatch(r"[a-z0-9.\-]+", licence):
        problems.append(f"license: {licence} in {CARD_NAME} is not an identifier of a licence such as apache-2.0")
    elif licence == "other" and not facts.get("license_name"):
        problems.append(f"license: other in {CARD_NAME} needs a license_name, and a license_link or a file LICENSE")
    if kind == "space":
        problems.extend(_space_front_matter(facts, files))
    elif facts.get("library_name") != "diffusers":
        problems.append(
            f"library_name: {facts.get('library_name')} in {CARD_NAME} hides it from those who look: diffusers"
        )
    if "[More Information Needed]" in match[2] or not re.search(r"\w", re.sub(r"^#.*$", "", match[2], flags=re.M)):
        problems.append(f"{CARD_NAME} says nothing yet: write what this is, how it is called, and its limits")
    remarks = []
    for picture, path in local_links(match[2]):
        if path in files:
            continue
        if picture:
            problems.append(f"the picture {path} of {CARD_NAME} is not in the folder")
        else:
            remarks.append(
                f"the link {path} of {CARD_NAME} leads out of the folder and is dead on the Hub without a source_url (--source-url)"
            )
    return list(dict.fromkeys(remarks))


def _space_front_matter(facts: dict[str, Any], files: dict[str, int]) -> Iterator[str]:
    if not facts.get("title"):
        yield f"{CARD_NAME} has no title: the Hub asks for one"
    if facts.get("sdk") != "gradio":
        yield f"sdk: {facts.get('sdk')} in {CARD_NAME} is not gradio"
    version = str(facts.get("sdk_version", ""))
    floor = ".".join(map(str, MIN_GRADIO))
    numbers = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", version)
    if not numbers or (int(numbers[1]), int(numbers[2])) < MIN_GRADIO:
        yield f"sdk_version: {version or 'none'} in {CARD_NAME} is below {floor}.0, which security advisories ask for"
    if str(facts.get("app_file", "app.py")) not in files:
        yield f"app_file: {facts.get('app_file', 'app.py')} of {CARD_NAME} is not in the folder"


def _check_space(folder: Path, files: dict[str, int], problems: list[str]) -> None:
    if "requirements.txt" not in files:
        problems.append("requirements.txt is missing: it names the packages that the app imports")
    if (total := sum(files.values())) > MAX_SPACE_BYTES:
        problems.append(f"the Space has {total / 1e9:.1f} GB: publish its model by itself and name it by MODEL_ID")
    for name in files:
        if name.endswith(".py"):
            try:
                compile((folder / name).read_bytes(), name, "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                problems.append(f"{name} is not Python ({first_line(error)})")
