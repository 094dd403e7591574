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
    before, after = result["knn_top1_random_init"], result["knn_top1"]  # after is None where no time was left for it
    print(f"kNN {before:.1f} % -> {after if after is None else round(after, 1)} % after {result['epochs']:.2f} epochs")
