"""The command lines are a contract: this list changes only with a line in CHANGELOG.md."""

from __future__ import annotations

import argparse

from fastbyol.cli import eval as evaluation
from fastbyol.cli import train
from fastbyol.data_prep import cli

COMMON_EVAL = "RUN_DIR --device --help --json --threads --train --val --workers"
CONTRACT = {
    "fastbyol-prep write": "SOURCE OUT.beton --classes-from --help --jpeg-share --label-column --limit --max-side "
    "--mode --on-error --overwrite --quality --workers",
    "fastbyol-prep verify": "FILE --help --workers",
    "fastbyol-prep info": "FILE --help --json",
    "fastbyol-prep demo": "DIR --help --overwrite --seed",
    "fastbyol-train": "RECIPE --base-lr --batch-size --budget --checkpoint-every --crop --crop-ramp --data "
    "--deterministic --device --engine --epochs --help --knn-at --lagged-target --loader --log-every --micro-batches "
    "--no-tensorboard --on-error --optimizer --out --overwrite --plan --precision --prefetch --profile --resume --seed "
    "--stop-on-collapse --tau-base --target-statistics --threads --val --wandb --warmup-epochs "
    "--weight-decay --workers",
    "fastbyol-eval knn": f"{COMMON_EVAL} --bank --k --temperature",
    "fastbyol-eval linear": f"{COMMON_EVAL} --cached --epochs --lrs --seed --skip-random-init",
    "fastbyol-eval semi": f"{COMMON_EVAL} --epochs --fraction --lrs --seed --skip-supervised --split",
    "fastbyol-eval transfer": f"{COMMON_EVAL} --metric --seed",
    "fastbyol-eval finetune": f"{COMMON_EVAL} --from-scratch --lrs --metric --seed --steps --weight-decays",
    "fastbyol-eval segment": "RUN_DIR --batch-size --crop-px --device --from-scratch --help --images --json --lr "
    "--masks --seed --steps --stride --threads --val-images --val-masks --weight-decay",
    "fastbyol-eval export": "RUN_DIR OUT --format --help --json",
    "fastbyol-eval table": "NAME --base --budget --cells --data --epochs --help --linear --out --seeds --val --with",
}


def flags(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """List each command's words: positional metavars and long flags."""
    found: dict[str, set[str]] = {}
    words = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found |= flags(child)
        elif action.option_strings:
            words.add(action.option_strings[-1])
        else:
            words.add(str(action.metavar or action.dest))
    return found or {parser.prog: words}


def test_flags_are_the_contract() -> None:
    found = flags(cli.build_parser()) | flags(train.build_parser()) | flags(evaluation.build_parser())
    assert found == {command: set(words.split()) for command, words in CONTRACT.items()}
