"""Completion of all command lines in a shell, as one script that holds every word and starts nothing."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable

from fastbyol.cli import embed, train
from fastbyol.cli import eval as evaluation
from fastbyol.recipes import RECIPES
from fastbyol.registry import PROTOCOLS

ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"  # zsh's reader of the rest
SCRIPT = """\
# Completion of fastbyol's commands, written by python -m fastbyol --completion {shell}; source it in ~/.{shell}rc.
_fastbyol() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[0]##*/}}"
    local words="" flags="" at="$command"
    case "$command" in
        {with_subcommands}) [ "$COMP_CWORD" -gt 1 ] && at="$command ${{COMP_WORDS[1]}}" ;;
    esac
    case "$at $before" in
{values}
        *)
            case "$at" in
{flags}
            esac
            case "$word" in
                -*) words="$flags" ;;
                *) [ "$COMP_CWORD" -eq 1 ] || words="" ;;
            esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _fastbyol {commands}
"""


def parsers(prep: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Build the parser of every command and subcommand, by its name; prep: fastbyol-prep's."""
    found: dict[str, argparse.ArgumentParser] = {
        "fastbyol-train": train.build_parser(),
        "fastbyol-eval": evaluation.build_parser(),
        "fastbyol-embed": embed.build_parser(),
    }
    for name in (*PROTOCOLS, *evaluation.COMMANDS):
        protocol = None if name in evaluation.COMMANDS else evaluation.find_protocol(name)
        found[f"fastbyol-eval {name}"] = evaluation.build_command_parser(name, protocol)
    (children,) = (action for action in prep._actions if isinstance(action, argparse._SubParsersAction))
    return found | {parser.prog: parser for parser in (prep, *children.choices.values())}


def script(shell: str, prep: argparse.ArgumentParser) -> str:
    """Write the script: subcommands and recipes first, then flags, and the words that a flag takes; else files."""
    found = parsers(prep)
    first = {"fastbyol-train": list(RECIPES)}
    for name in found:
        command, _, subcommand = name.partition(" ")
        if subcommand:
            first.setdefault(command, []).append(subcommand)
    values, flags = [], []
    for name, parser in found.items():
        own = [action for action in parser._actions if action.option_strings]
        for action in own:
            if action.nargs != 0:
                patterns = "|".join(shlex.quote(f"{name} {flag}") for flag in action.option_strings)
                values.append(f"        {patterns}) words={_quoted(action.choices or ())} ;;")
        longest = [action.option_strings[-1] for action in own]
        flags.append(
            f"                {shlex.quote(name)}) flags={_quoted(longest)} words={_quoted(first.get(name, ()))} ;;"
        )
    commands = [name for name in found if " " not in name]
    written = SCRIPT.format(
        shell=shell,
        with_subcommands="|".join(name for name in commands if name in first and name != "fastbyol-train"),
        values="\n".join(values),
        flags="\n".join(flags),
        commands=" ".join(commands),
    )
    return ZSH + written if shell == "zsh" else written


def _quoted(words: Iterable[object]) -> str:
    return shlex.quote(" ".join(map(str, words)))
