"""Train a language model: `python scripts/train.py --backbone cfc`; `--help` lists every flag."""

import sys

try:
    from ember_ext.training.cli import train_main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install the package and what it needs with: pip install .")

if __name__ == "__main__":
    sys.exit(train_main())
