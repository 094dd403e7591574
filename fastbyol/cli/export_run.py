"""What fastbyol-eval export does: a run's encoder in another library's format, with its model card."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fastbyol.cli.trained import open_run
from fastbyol.errors import require
from fastbyol.export import formats, model_card, target
from fastbyol.storage import files
from fastbyol.storage.run_folder import RunFolder
from fastbyol.storage.scores import Scores, load_scores
from fastbyol.system.shell import quoted

CARD = "model-card.md"  # beside a file
README = "README.md"  # the card in a folder, where hubs show it
CONFIG = "config.json"  # of timm's layout


def export(args: argparse.Namespace, *, notify: Callable[[str], None]) -> Scores:
    """Write the encoder of a run to a file or into a folder, with a model card; return what was written."""
    folder, out = RunFolder(args.run_dir), Path(args.out)
    own = (folder.path, folder.checkpoints, folder.scores, folder.splits, folder.tensorboard, folder.profile)
    inside = out if target.is_folder(args.out) else out.parent
    require(
        inside.resolve() not in [path.resolve() for path in own],
        f"{out} lies in the run folder and could replace a file of the run; give a path in another folder",
    )
    other = RunFolder(inside)
    require(
        not (target.is_folder(args.out) and other.config.is_file() and other.metrics.is_file()),
        f"{out} is the folder of another run, and the export would be taken for its encoder; give another folder",
    )
    folder_kind = "timm" if formats.name_in("timm", folder.read_config().recipe.encoder) else "safetensors"
    to = target.choose(args.out, args.format, folder_kind=folder_kind)
    config, encoder, result, unfinished = trained = open_run(folder, notify=notify)
    card = to.path.with_name(README) if to.is_folder else _card_beside(to.path)
    for path in (*([card] if to.is_folder else []), *([card.with_name(CONFIG)] if to.kind == "timm" else [])):
        target.require_own(path)
    view = formats.EvalView(config.recipe.eval_px, config.recipe.eval_margin)
    formats.write(to.kind, to.path, encoder, config.recipe.encoder, px=view.px, margin=view.margin)
    written = model_card.render(
        config,
        result,
        load_scores(folder),
        kind=to.kind,
        name=to.path.name,
        folder=to.path.parent.resolve().name if to.is_folder else None,
        features=encoder.features,
        unfinished=unfinished,
    )
    files.write(card, written)
    return {
        "protocol": "export",
        "run": str(folder.path),
        "file": str(to.path),
        "format": to.kind,
        "model_card": str(card),
        **trained.facts,
    }


def _card_beside(path: Path) -> Path:
    """Return the path of a file's card: model-card.md, or one of its own where that is the card of another file."""
    card = path.with_name(CARD)
    if card.exists() and not card.read_text(encoding="utf-8", errors="replace").startswith(f"# {path.name}\n"):
        return path.with_name(f"{path.name}.{CARD}")
    return card


def summary(exported: Scores) -> str:
    """Say what was written and, of a folder for a hub, how it gets there."""
    text = f"wrote {exported['file']} and {exported['model_card']}"
    if Path(exported["model_card"]).name != README:
        return text
    folder = Path(exported["file"]).parent
    return f"{text}; to a hub: hf upload OWNER/NAME {quoted(folder)}"
