"""`python -m fastbyol.eval`: fastbyol-eval."""

import sys

from fastbyol.cli.eval import main

if __name__ == "__main__":
    sys.exit(main())
