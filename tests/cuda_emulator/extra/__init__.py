"""Cases beyond `problems.COMMON`: NAME.py with `CASES: tuple[Small, ...]` adds those of variant NAME."""
