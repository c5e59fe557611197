"""Many pictures in one run, on any number of processes: a list of jobs becomes a folder of pictures.

A job is one output. What it gives depends on its own settings, seed and input alone, so neither the order of the jobs
nor the number of processes nor a kill in between can be seen in the results.
"""

from .capabilities import CAPABILITIES, Capability, find_capability
from .jobs import Fields, Job, SpecError, folder_jobs, read_spec, seed_for
from .run import BatchReport, run_batch


__all__ = [
    "CAPABILITIES",
    "BatchReport",
    "Capability",
    "Fields",
    "Job",
    "SpecError",
    "find_capability",
    "folder_jobs",
    "read_spec",
    "run_batch",
    "seed_for",
]
