"""One file = one pass, named like its file; `_helpers.py` are shared by passes only."""
