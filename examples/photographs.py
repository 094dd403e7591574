"""From a folder of photographs to a map of them: train without labels, then vectors, near copies and a page to look at.

Usage: python examples/photographs.py PHOTOS OUT 30m [RECIPE]
"""

import json
import sys
from pathlib import Path

from fastbyol.cli.embed import main as embed
from fastbyol.cli.train import main as train

photos, out, budget, recipe = (*sys.argv[1:], "imagenette_rn18")[:4]
run, vectors, page = Path(out) / "run", Path(out) / "vectors.npz", Path(out) / "map.html"

# Folders are no classes here; the photographs are converted once. --resume goes on where an earlier call was stopped.
asked = [f"--data={photos}", "--prep", "--labels none", f"--budget={budget}", f"--out={run}", "--resume"]
status = train([recipe, *asked, "--quality-at=0.25,0.5,0.75"])
if status:
    sys.exit(status)
result = json.loads((run / "result.json").read_text())
before, after = result["quality_random_init"], result["quality"]
print(f"RankMe {before['rankme']:.1f} -> {after['rankme']:.1f} after {result['epochs']:.2f} epochs")

shown = ["--map", str(page), "--clusters=8", "--duplicates=0.98", "--overwrite"]
sys.exit(embed([str(run), photos, f"--out={vectors}", "--prep", "--labels none", *shown]))
