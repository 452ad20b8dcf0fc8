"""Classify sequences: `python scripts/classify.py --cell cfc --gate`; `--help` lists every flag."""

import os
import sys

# By default OpenMP threads spin while they wait, which on a busy machine more than doubles the time
# of a step. This has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    from ember_ext.paper.sequences.cli import classify_main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install the package and what it needs with: pip install .")

if __name__ == "__main__":
    sys.exit(classify_main())
