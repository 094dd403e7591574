"""`python -m fastbyol.train`: fastbyol-train."""

import sys

from fastbyol.cli.train import main
from fastbyol.system.output import run_command

if __name__ == "__main__":
    sys.exit(run_command("fastbyol-train", main))
