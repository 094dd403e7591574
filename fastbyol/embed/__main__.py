"""`python -m fastbyol.embed`: fastbyol-embed."""

from fastbyol.cli.start import embed

if __name__ == "__main__":
    embed()
