"""The grid of runs behind the paper's tables and figures: `python scripts/reproduce.py`."""
