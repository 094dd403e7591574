"""`python -m fastbyol.eval`: fastbyol-eval."""

import sys

from fastbyol.cli.eval import main
from fastbyol.system.output import run_command

if __name__ == "__main__":
    sys.exit(run_command("fastbyol-eval", main))
