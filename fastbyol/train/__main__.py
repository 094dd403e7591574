"""`python -m fastbyol.train`: fastbyol-train."""

from fastbyol.cli.start import train

if __name__ == "__main__":
    train()
