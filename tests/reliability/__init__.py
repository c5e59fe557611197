"""The reliability harness: every probe runs over the subjects that `registry.py` and `functions.py` list."""
