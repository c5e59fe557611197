"""Runs code in a new interpreter that has imported nothing but this package, and compares digests of what it computed.

A component that loads in the process that saved it may still be lost to everyone else: diffusers resolves classes of
other packages from `sys.modules` only. So the reload is done where only `import diffusers_ext` was executed.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file


ROOT = Path(__file__).resolve().parents[2]
# `_loaded` looks a class up without importing anything: the package under test must have done that.
_PREAMBLE = """
import sys
from tests.helpers.network import network_blocked
_blocked = network_blocked()  # kept, or it would be collected and undone
_blocked.__enter__()
def _loaded(name):
    for package in ("diffusers_ext", "diffusers", *sys.argv[1:]):
        if package in sys.modules and hasattr(sys.modules[package], name):
            return getattr(sys.modules[package], name)
    raise SystemExit(f"{name} is in none of the imported packages")
"""
_RUN_PIPELINE = """
import torch
from safetensors.torch import load_file
from tests.helpers.fresh_process import digest
from tests.helpers.placement import in_own_memory
pipeline = in_own_memory(_loaded({class_name!r}).from_pretrained({folder!r}))
pipeline.set_progress_bar_config(disable=True)
inputs = dict({inputs!r}, **load_file({tensors!r}))
inputs["generator"] = torch.Generator().manual_seed({seed})
print("digest", digest(pipeline(**inputs, return_dict=False)[0]))
print("scheduler", type(pipeline.scheduler).__name__)
"""


def digest(output: Any) -> str:
    """SHA-256 of an array, tensor or list of pictures, of its type and of its shape."""
    state = hashlib.sha256()
    for item in output if isinstance(output, list) else [output]:
        array = item.detach().cpu().contiguous() if isinstance(item, torch.Tensor) else np.ascontiguousarray(item)
        state.update(f"{array.dtype}{tuple(array.shape)}".encode())
        state.update(array.flatten().view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array.tobytes())
    return state.hexdigest()


def run_fresh(
    code: str,
    *,
    imports: Sequence[str] = ("diffusers_ext",),
    env: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 400,
) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter after `import <name>` for each of `imports`.

    The interpreter has the repository on its path, the number of threads of this one and no network. `_loaded(name)`
    in `code` gives a class of the imported packages or of diffusers.

    Args:
        code (`str`):
            Python source.
        imports (`Sequence[str]`, *optional*, defaults to `("diffusers_ext",)`):
            Modules that are imported first; all that the interpreter knows of this package.
        env (`Mapping[str, str]`, *optional*):
            Environment variables over those of this process.
        check (`bool`, *optional*, defaults to `True`):
            Whether a failure raises.
        timeout (`float`, *optional*, defaults to 400):
            Seconds after which the interpreter is stopped.

    Returns:
        `subprocess.CompletedProcess`: With `stdout` and `stderr` as text.

    Raises:
        AssertionError: If the interpreter failed and `check` is true; the message ends with its error.
    """
    program = _PREAMBLE + "".join(f"import {name}\n" for name in imports) + code
    variables = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **(env or {})}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", program, *imports], env=variables, capture_output=True, text=True, timeout=timeout
    )
    if check and result.returncode != 0:
        raise AssertionError(
            f"a fresh process with only {', '.join(imports)} imported failed:\n{result.stderr[-3000:]}"
        )
    return result


def facts(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The `key value` lines that a fresh process printed."""
    return dict(line.split(" ", 1) for line in result.stdout.splitlines() if " " in line)


def assert_reloads_equal(
    pipeline: Any,
    folder: Path,
    inputs: Mapping[str, Any],
    *,
    class_name: str | None = None,
    imports: Sequence[str] = ("diffusers_ext",),
    seed: int = 0,
) -> None:
    """Saves `pipeline`, reloads it in a fresh process and requires the same output, bit for bit.

    Args:
        pipeline:
            A `DiffusionPipeline`.
        folder (`Path`):
            An empty folder that it is saved to.
        inputs (`Mapping[str, Any]`):
            Arguments of the call: tensors and what JSON can hold; no generator.
        class_name (`str`, *optional*):
            Class that loads the folder; the pipeline's own by default.
        imports (`Sequence[str]`, *optional*, defaults to `("diffusers_ext",)`):
            All that the fresh process imports.
        seed (`int`, *optional*, defaults to 0):
            Seed of the generator of both calls.
    """
    pipeline.save_pretrained(folder / "pipeline")
    tensors = {name: value.contiguous() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in inputs.items() if name not in tensors}
    json.dumps(plain)
    save_file(tensors, folder / "inputs.safetensors")
    here = digest(pipeline(**inputs, generator=torch.Generator().manual_seed(seed), return_dict=False)[0])
    name = class_name or type(pipeline).__name__
    code = _RUN_PIPELINE.format(
        class_name=name,
        folder=str(folder / "pipeline"),
        tensors=str(folder / "inputs.safetensors"),
        inputs=plain,
        seed=seed,
    )
    there = facts(run_fresh(code, imports=imports))
    scheduler = type(pipeline.scheduler).__name__
    assert there["scheduler"] == scheduler, f"saved with {scheduler}, reloaded as {there['scheduler']}"
    assert there["digest"] == here, f"{name} gives other numbers after a reload in a fresh process"
