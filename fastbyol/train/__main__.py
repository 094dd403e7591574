"""`python -m fastbyol.train`: fastbyol-train."""

import sys

from fastbyol.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
