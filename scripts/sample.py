"""Write text with a trained model: `python scripts/sample.py RUN --prompt "ROMEO:"`."""

import sys

try:
    from ember_ext.paper.training.cli import sample_main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install the package and what it needs with: pip install .")

if __name__ == "__main__":
    sys.exit(sample_main())
