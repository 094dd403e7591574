"""Train from Python: a recipe with changes of one's own, a budget, a run folder; prints the result.

Usage: python examples/train.py TRAIN.beton VAL.beton OUT 60s
"""

import sys
from dataclasses import replace

from fastbyol.budget import parse_duration
from fastbyol.config import Config
from fastbyol.recipes import named
from fastbyol.train import run

train, val, out, budget = sys.argv[1:]
recipe = named("demo")
recipe = replace(recipe, head=replace(recipe.head, hidden=256))
config = Config(recipe, data=train, val=val, budget_s=parse_duration(budget), seed=1)
result = run(config, out, overwrite=True)
if result is not None:  # None: interrupted, resumable with run(config, out, resume=True)
    print(f"kNN {result['knn_top1_random_init']:.1f} -> {result['knn_top1']:.1f} % after {result['epochs']:.2f} epochs")
