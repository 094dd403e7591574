"""The command lines are a contract: this list changes only with a line in CHANGELOG.md."""

from __future__ import annotations

import argparse

import pytest

from fastbyol import __main__ as everything
from fastbyol.cli import completion, embed
from fastbyol.cli import eval as evaluation
from fastbyol.config import ENGINES, PRECISIONS
from fastbyol.data_prep import cli as prep
from fastbyol.embed import formats as vector_formats
from fastbyol.embed import layout, vectors
from fastbyol.export import formats
from fastbyol.registry import PROTOCOL_SUMMARIES, PROTOCOLS
from fastbyol.system.command_line import PREP_FLAGS
from fastbyol.train import step

COMMON_EVAL = "ENCODER --device --help --json --margin --px --threads --train --val --workers --cache --prep --on-error"
# flags that do nothing unless they are given
WITHOUT_DEFAULT = {
    "data",
    "val",
    "budget",
    "knn_at",
    "quality_at",
    "wandb",
    "plan",
    "val_masks",
    "classes_from",
    "more",
    "prep",
    "image_key",
    "labels_from",
}
CONTRACT = {
    "fastbyol-prep": "COMMAND --help --version",
    "fastbyol-prep write": "SOURCE OUT.beton --classes-from --help --image-key --jpeg-share --label-column --labels "
    "--labels-from --limit --max-pixels --max-side --mode --on-error --overwrite --quality --stretch --workers",
    "fastbyol-prep verify": "FILE --help --workers",
    "fastbyol-prep info": "FILE --duplicates --help --json",
    "fastbyol-prep demo": "DIR --help --overwrite --seed",
    "fastbyol": "--completion --help --version",
    "fastbyol-train": "RECIPE --base-lr --batch-size --budget --cache --channels --checkpoint-every --config --crop "
    "--crop-ramp --data --deterministic --device --engine --epochs --help --init --knn-at --labelled --lagged-target "
    "--loader --log-every --memory-side --method --micro-batches --no-tensorboard --on-error --optimizer --out "
    "--overwrite --plan --precision --prefetch --prep --profile --quality-at --recipes --resume --save-config --seed "
    "--settings --stop-on-collapse --tau-base --target-statistics --threads --val --version --wandb --warmup-epochs "
    "--weight-decay --workers",
    "fastbyol-eval": "--help --version",
    "fastbyol-eval knn": f"{COMMON_EVAL} --bank --k --temperature",
    "fastbyol-eval linear": f"{COMMON_EVAL} --cached --epochs --lrs --seed --skip-random-init",
    "fastbyol-eval semi": f"{COMMON_EVAL} --epochs --fraction --lrs --seed --skip-supervised --split",
    "fastbyol-eval transfer": f"{COMMON_EVAL} --metric --seed",
    "fastbyol-eval finetune": f"{COMMON_EVAL} --from-scratch --lrs --metric --seed --steps --weight-decays",
    "fastbyol-eval segment": "ENCODER --batch-size --crop-px --device --from-scratch --help --images --json --lr "
    "--masks --seed --steps --stride --threads --val-images --val-masks --weight-decay",
    "fastbyol-eval quality": f"{COMMON_EVAL.replace('--val ', '')} --images --seed",
    "fastbyol-eval export": "RUN_DIR OUT --format --help --json",
    "fastbyol-eval table": "NAME --base --budget --cache --cells --data --epochs --help --linear --out --prep "
    "--seeds --val --with",
    "fastbyol-embed": "ENCODER SOURCE --cache --clusters --device --dtype --duplicates --help --json --layout --map "
    "--margin --neighbours --normalize --on-error --out --overwrite --prep --px --seed --threads --version --workers",
}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Build the parser of every command and subcommand, by its name."""
    return {"fastbyol": everything.build_parser(), **completion.parsers(prep.build_parser())}


def words(parser: argparse.ArgumentParser) -> set[str]:
    """List a parser's words: positional metavars and long flags."""
    return {
        action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
        for action in parser._actions
    }


def test_flags_are_the_contract() -> None:
    found = {name: words(parser) for name, parser in parsers().items()}
    assert found == {command: set(text.split()) for command, text in CONTRACT.items()}


@pytest.mark.parametrize("name", CONTRACT)
def test_help_says_what_each_word_is_for_and_its_default(name: str) -> None:
    parser = parsers()[name]
    for action in parser._actions:
        about = f"{name} {action.option_strings or action.dest}"
        assert action.help or isinstance(action, argparse._SubParsersAction), about
        has_default = action.nargs != 0 and not action.required and action.option_strings
        shown = parser._get_formatter()._get_help_string(action) or ""
        assert not has_default or "default" in shown or action.dest in WITHOUT_DEFAULT, about


@pytest.mark.parametrize("columns", [50, 80])
@pytest.mark.parametrize("name", CONTRACT)
def test_help_fits_the_terminal(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = [line.strip() for line in parsers()[name].format_help().splitlines() if len(line) > columns]
    assert not [line for line in lines if not (line.startswith("[--") and line.endswith("]"))]  # in usage: one flag


def test_flags_that_go_to_prep_are_those_of_its_write_alone() -> None:
    flags = {name: {word for word in words(parser) if word.startswith("--")} for name, parser in parsers().items()}
    assert set(PREP_FLAGS) == flags["fastbyol-prep write"] - flags["fastbyol-train"]


def test_defaults_of_several_values_are_shown_in_short() -> None:
    shown = parsers()["fastbyol-eval linear"].format_help()
    assert "(default: 0.4 0.3 0.2 0.1 0.05)" in " ".join(shown.split())
    assert "(default: 0)" in parsers()["fastbyol-train"].format_help()


def test_names_that_the_parser_lists_are_those_that_can_be_built() -> None:
    assert tuple(step.ENGINES) == ENGINES
    assert tuple(step.PRECISIONS) == PRECISIONS
    assert tuple(formats.FORMATS) == evaluation.FORMATS
    assert PROTOCOL_SUMMARIES.keys() == PROTOCOLS.keys()
    assert tuple(vector_formats.FORMATS) == embed.SUFFIXES
    assert vectors.DTYPES == embed.DTYPES
    assert tuple(layout.TITLES) == embed.LAYOUTS
