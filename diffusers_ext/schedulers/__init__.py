"""Schedulers that diffusers lacks, one family a file.

Each module is imported here eagerly: diffusers finds the class that a saved `scheduler_config.json` or `model_index.json`
names only if its module is already in `sys.modules`.
"""

from diffusers.schedulers.scheduling_utils import SchedulerMixin


__all__ = ["SchedulerMixin"]
