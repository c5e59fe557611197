"""Model folders that are known to be sound before anything is computed from them.

A model folder can be cut short by a full disk or a kill, or altered in transit, and stock loading notices only part of it:
a NaN weight, a flipped bit or a renamed tensor loads without an error. Here

* a save is written beside its target and moved into place (see `atomic.py`), and ends with a manifest of SHA-256 digests;
* a folder that has a manifest is compared with it before it is loaded;
* weights are checked to be present and finite after loading, manifest or not;
* nothing is ever unpickled: only safetensors are read.

`manifest.py` says what a manifest can tell and what it cannot.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import nn

from .atomic import atomic_folder, atomic_update, atomic_write, finish_update, has_update, remove_with_update
from .manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    DamagedFileError,
    UnsafeFileError,
    covered_files,
    digest_of,
    first_line,
    read_digests,
    read_json_object,
    verify_manifest,
    write_digests,
    write_manifest,
)


__all__ = [
    "INDEX_NAME",
    "MANIFEST_NAME",
    "CheckedLoadingMixin",
    "DamagedFileError",
    "UnsafeFileError",
    "atomic_folder",
    "atomic_update",
    "atomic_write",
    "check_weights",
    "finish_update",
    "first_line",
    "read_json_object",
    "remove_with_update",
    "verify_manifest",
    "write_manifest",
]

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Where the components of this package say that they come from.
_OWN = "diffusers_ext."
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# `name[.variant][-00001-of-00002].safetensors[.index[.variant].json]`
_WEIGHTS = re.compile(
    r"[^.]+?(?:\.(?P<variant>[^.-]+))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<of_index>[^.]+))?\.json)?"
)


def check_weights(modules: Mapping[str, nn.Module]) -> None:
    """Checks that every weight is there and finite.

    Args:
        modules (`dict[str, nn.Module]`): Component name to network. Weights that a device map put away are not looked at.

    Raises:
        DamagedFileError: If a weight was left without a value (on the meta device) or holds a NaN or an infinity. The
            message names the component and the tensor.

    Example:
        ```python
        import torch
        from diffusers_ext.integrity import check_weights

        check_weights({"unet": torch.nn.Linear(2, 2)})
        ```
    """
    for component, module in modules.items():
        put_away = hasattr(module, "hf_device_map") or hasattr(module, "_hf_hook")
        for name, tensor in module.state_dict().items():
            if not isinstance(tensor, torch.Tensor) or (tensor.is_meta and put_away):
                continue
            if tensor.is_meta:
                raise DamagedFileError(
                    f"{component}: tensor {name!r} is not in the .safetensors file; fetch it again, it is damaged or "
                    f"belongs to another version of {type(module).__name__}"
                )
            if not _is_finite(tensor):
                raise DamagedFileError(
                    f"{component}: tensor {name!r} of the .safetensors file holds values that are not finite (NaN or "
                    "infinity); fetch or train the weights again"
                )


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float16)
    # The extremes carry a NaN along, and need no mask as large as the weights.
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


class CheckedLoadingMixin:
    """Gives a pipeline a `from_pretrained` that refuses damaged folders and a `save_pretrained` that leaves none.

    Put it before the pipeline class: `class MyPipeline(CheckedLoadingMixin, StableDiffusionPipeline)`. A class may have a
    class method `_check_family(index, source)`; it is given the parsed `model_index.json` before any weight is fetched, and
    raises if the model is of a family that the pipeline cannot use.

    Everything else is as in diffusers: the same arguments, folders and Hub ids, `from_pipe`, `push_to_hub`.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Loads the pipeline from a folder or the Hub, and checks it.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder in the diffusers layout, or a Hub id.
            kwargs: As in `DiffusionPipeline.from_pretrained`; `use_safetensors` may only be `True`.

        Returns:
            The pipeline.

        Raises:
            DamagedFileError: If a file is missing, incomplete or altered; the message names it.
            UnsafeFileError: If a component has no safetensors weights, only pickled ones.
            ValueError: If `use_safetensors=False`, or the model is of another family.
            OSError: If there is no such folder or repository.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "use_safetensors=False would unpickle weight files, which runs code they contain; leave it out and save "
                "the weights with safe_serialization=True"
            )
        kwargs["use_safetensors"] = True
        source = pretrained_model_name_or_path
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                f"pretrained_model_name_or_path={source!r} is of type {type(source).__name__}; give a folder or a Hub id"
            )
        name = os.fspath(source)
        folder, is_snapshot = _fetch(cls, name, isinstance(source, os.PathLike), kwargs)
        if not is_snapshot:
            finish_update(folder)
        check_family = getattr(cls, "_check_family", None)
        if check_family is not None:
            check_family(read_json_object(folder / INDEX_NAME), name)
        verify_manifest(folder, complete=not is_snapshot)
        components = _check_files(folder, cls, kwargs)
        try:
            pipeline = super().from_pretrained(str(folder), **kwargs)  # type: ignore[misc]
        except Exception as error:
            translated = _translated(error, folder)
            if translated is None:
                raise
            raise translated from error
        pipeline.register_to_config(_name_or_path=name)
        modules = {key: value for key, value in pipeline.components.items() if isinstance(value, nn.Module)}
        check_weights(modules)
        for key in components:
            if key in modules:
                _check_complete(folder / key, modules[key], kwargs.get("variant"))
        _check_numbers(pipeline.components, folder)
        _check_lengths(pipeline.components, folder)
        return pipeline

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the pipeline so that a kill, a crash or a full disk leaves the folder as it was or complete.

        Args:
            save_directory (`str` or `os.PathLike`): The folder. Files in it that are not the pipeline's own are kept.
            safe_serialization (`bool`, *optional*, defaults to `True`): Only `True`; pickles are not written.
            variant (`str`, *optional*): Such as `"fp16"`; goes into the weights' file names.
            max_shard_size (`int` or `str`, *optional*): As in `DiffusionPipeline.save_pretrained`.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload it afterwards.
            kwargs: `repo_id`, `commit_message`, `private`, `token`, `create_pr` of the upload.

        Raises:
            OSError: If it cannot be written; the folder is then as before.
            ValueError: If `safe_serialization=False`, the folder is the working folder, the home folder or a git checkout,
                or a component cannot be saved, which would make a folder that cannot be loaded.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False would write pickles; leave it out, safetensors are always written"
            )
        if not isinstance(save_directory, (str, os.PathLike)) or not os.fspath(save_directory):
            raise TypeError(
                f"save_directory={save_directory!r} is not the path of a folder; give a str or a pathlib.Path"
            )
        target = Path(save_directory)
        exists = target.is_dir()
        with atomic_update(target, last=[INDEX_NAME, MANIFEST_NAME]) if exists else atomic_folder(target) as staging:
            configuration = dict(self.config)  # type: ignore[attr-defined]
            try:
                super().save_pretrained(  # type: ignore[misc]
                    str(staging), safe_serialization=True, variant=variant, max_shard_size=max_shard_size
                )
            finally:
                # Stock saving forgets a component that it could not save; the pipeline in memory still has it.
                self.register_to_config(**configuration)  # type: ignore[attr-defined]
            self._check_saved(staging)
            digests = {name: digest_of(staging / name) for name in covered_files(staging)}
            if exists:
                stale = _stale(target, staging, variant)
                remove_with_update(staging, stale)
                digests = {**_kept_digests(target, stale), **digests}
            write_digests(staging, digests)
        if push_to_hub:
            kwargs.setdefault("repo_id", target.resolve().name)
            self.push_to_hub(variant=variant, **kwargs)  # type: ignore[attr-defined]

    def _check_saved(self, folder: Path) -> None:
        index = read_json_object(folder / INDEX_NAME)
        for name, component in self.components.items():  # type: ignore[attr-defined]
            if component is not None and (name not in index or not (folder / name).is_dir()):
                raise ValueError(
                    f"{name} is a {type(component).__module__}.{type(component).__qualname__}, which cannot be saved with "
                    "a pipeline; replace it by a component of diffusers, transformers or this package first"
                )


def _fetch(cls: type, name: str, is_path: bool, kwargs: dict[str, Any]) -> tuple[Path, bool]:
    """The folder to load from, and whether it is a partial snapshot of the Hub."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, INDEX_NAME)) and not has_update(name):
            raise DamagedFileError(f"{os.path.join(name, INDEX_NAME)} is missing; name a folder that holds a pipeline")
        return Path(name), False
    if is_path or os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise FileNotFoundError(
            f"pretrained_model_name_or_path={name!r} is not a folder; give a folder that holds {INDEX_NAME}, or a Hub id "
            "like 'owner/name'"
        )
    where = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "revision", "token") if key in kwargs}
    try:
        # at the revision that the caller gave
        index = read_json_object(hf_hub_download(name, INDEX_NAME, **where))  # nosec B615
        if hasattr(cls, "_check_family"):
            cls._check_family(index, name)
        if any(isinstance(value, list) and str(value[0]).startswith(_OWN) for value in index.values() if value):
            # diffusers takes components of another package for code in the repository, even if that package is imported.
            wanted = [f"{key}/*.{ending}" for key in index for ending in ("json", "safetensors", "txt", "model")]
            folder = Path(snapshot_download(name, allow_patterns=[INDEX_NAME, *wanted], **where))  # nosec B615
        else:
            folder = Path(cls.download(name, **kwargs))  # type: ignore[attr-defined]
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise OSError(
            f"pretrained_model_name_or_path={name!r} is neither a folder here nor a model that can be had from the Hub "
            f"({first_line(error)}); check the name and the connection, or give a folder that holds {INDEX_NAME}"
        ) from error
    try:
        # diffusers downloads only what it knows; the commit is the one that it downloaded, whatever was pushed since.
        hf_hub_download(name, MANIFEST_NAME, **{**where, "revision": folder.name})  # nosec B615
    except EntryNotFoundError:
        # Most repositories have none. Offline this also says that none was fetched when the model was.
        pass
    for key in _DOWNLOAD:
        kwargs.pop(key, None)
    return folder, True


def _check_files(folder: Path, cls: type, kwargs: Mapping[str, Any]) -> list[str]:
    """Looks at what stock loading would trip over; returns the components that will be read from the folder."""
    index = read_json_object(folder / INDEX_NAME)
    expected, _ = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
    components = []
    for name in sorted(expected & index.keys()):
        value = index[name]
        if not isinstance(value, list) or len(value) != 2 or not all(i is None or isinstance(i, str) for i in value):
            raise DamagedFileError(
                f"{folder / INDEX_NAME} is damaged: {name}={value!r} is not a pair of library and class; fetch it again"
            )
        if name not in kwargs and value[0] is not None:
            components.append(name)
            _check_component_files(folder / name)
    return components


def _check_component_files(folder: Path) -> None:
    if not folder.is_dir():
        raise DamagedFileError(
            f"{folder} is missing, though {INDEX_NAME} lists it; save or fetch {folder.parent} again"
        )
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UnsafeFileError(
            f"{folder / pickles[0]} is a pickle and is not read, because unpickling runs code from the file; load it "
            "elsewhere from a source you trust and save it with safe_serialization=True"
        )
    for name in names:
        if name.endswith(("config.json", ".index.json")):
            read_json_object(folder / name)


def _translated(error: Exception, folder: Path) -> Exception | None:
    """A sentence for what stock loading raised, or `None` if that is one already."""
    if isinstance(error, (DamagedFileError, UnsafeFileError, MemoryError, torch.OutOfMemoryError)):
        return None
    component = _component_being_loaded(error)
    if component is None:
        # Not about a component's files: the caller's arguments, or what a pipeline says of the components it is given.
        # Subclasses of ValueError, but for ours, are not sentences (a version that cannot be parsed, a failed decoding).
        if isinstance(error, (OSError, NotImplementedError, ImportError)) or type(error) is ValueError:
            return None
        if type(error).__module__.split(".")[0] == __name__.split(".")[0]:
            return None
        return DamagedFileError(
            f"{folder} cannot be built into a pipeline: its {INDEX_NAME} or the config.json of a component is damaged "
            f"({type(error).__name__}: {first_line(error)}); save or fetch it again"
        )
    if isinstance(error, OSError) and component in str(error):
        return None
    return DamagedFileError(
        f"{folder / component} cannot be loaded: its files are damaged, or belong to another class than {INDEX_NAME} says "
        f"({type(error).__name__}: {first_line(error)}); save or fetch it again"
    )


def _component_being_loaded(error: BaseException) -> str | None:
    """diffusers loads all components in one loop and does not tell which one failed; the traceback does."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == "load_sub_model":
            name = traceback.tb_frame.f_locals.get("name")
            return name if isinstance(name, str) else None
        traceback = traceback.tb_next
    return None


def _check_complete(folder: Path, module: nn.Module, variant: str | None) -> None:
    """transformers fills a weight that the file lacks with random numbers and logs it; here it is damage."""
    present: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            present.update(file.keys())
    if not present or set(module.state_dict()) <= present:
        return
    # Names may differ for good reasons (tied weights, names of an older release), which only the loader knows.
    try:
        _, report = type(module).from_pretrained(  # type: ignore[attr-defined]
            folder, use_safetensors=True, variant=variant, output_loading_info=True
        )
    except (AttributeError, TypeError):
        return
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise DamagedFileError(
            f"{folder}: tensor {missing[0]!r} is not in the .safetensors file; fetch it again, it is damaged or belongs "
            f"to another version of {type(module).__name__}"
        )


def _check_numbers(components: Mapping[str, Any], folder: Path) -> None:
    """Settings that load, and turn every picture into NaN."""
    for name, component in components.items():
        kept = getattr(component, "alphas_cumprod", None)
        if isinstance(kept, torch.Tensor) and not bool(((kept >= 0) & (kept <= 1)).all()):
            raise DamagedFileError(
                f"{folder / name}: the noise schedule of its scheduler_config.json leaves [0, 1] (alphas_cumprod from "
                f"{kept.min():.3g} to {kept.max():.3g}); check its betas, or fetch it again"
            )
        factor = getattr(getattr(component, "config", None), "scaling_factor", None)
        if factor is not None and (isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor == 0):
            raise DamagedFileError(
                f"{folder / name}: scaling_factor={factor!r} in its config.json is not a number other than 0; fetch it again"
            )


def _check_lengths(components: Mapping[str, Any], folder: Path) -> None:
    """CLIP pads each prompt to its tokenizer's length, which transformers takes to be endless if the file does not say."""
    for name, component in components.items():
        length = getattr(component, "model_max_length", 1)
        longest = 2**20 if "CLIP" in type(component).__name__ else math.inf
        if not isinstance(length, int) or not 1 <= length <= longest:
            raise DamagedFileError(
                f"{folder / name}: model_max_length={length!r} of its tokenizer_config.json is not a number of tokens; fetch "
                "it again"
            )


def _variant_of(name: str) -> str | None:
    match = _WEIGHTS.fullmatch(name)
    return (match.group("of_index") or match.group("variant")) if match else None


def _stale(target: Path, staging: Path, variant: str | None) -> list[str]:
    """Weights of an earlier save that the new one does not replace by name, such as shards, and that would shadow it."""
    stale = []
    for folder in (path for path in staging.iterdir() if path.is_dir() and (target / path.name).is_dir()):
        for path in (target / folder.name).iterdir():
            if (
                _WEIGHTS.fullmatch(path.name)
                and _variant_of(path.name) == variant
                and not (folder / path.name).exists()
            ):
                stale.append(f"{folder.name}/{path.name}")
    return stale


def _kept_digests(target: Path, stale: Iterable[str]) -> dict[str, str]:
    """What the old manifest says of files that stay; hashing them anew would declare damage to be sound."""
    if not (target / MANIFEST_NAME).is_file():
        return {}
    gone = set(stale)
    old = read_digests(target)
    return {name: digest for name, digest in old.items() if name not in gone and (target / name).is_file()}
