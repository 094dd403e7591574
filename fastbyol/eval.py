"""`python -m fastbyol.eval`: fastbyol-eval."""

from fastbyol.cli.start import evaluate

if __name__ == "__main__":
    evaluate()
