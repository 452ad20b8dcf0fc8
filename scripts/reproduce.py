"""Reproduce the paper: `python scripts/reproduce.py --suite quick`; `--help` lists every flag."""

import sys

try:
    from ember_ext.paper.reproduce import reproduce_main
except ModuleNotFoundError as error:
    sys.exit(f'error: {error}; install the package and what it needs with: pip install ".[paper]"')

if __name__ == "__main__":
    sys.exit(reproduce_main())
