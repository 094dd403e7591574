"""The command fastbyol-torchrun: torchrun, with its options, which ends with the status of its ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from fastbyol.system.command_line import DONE, INTERRUPTED, RANK_LOST
from fastbyol.system.output import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run fastbyol-torchrun; return its exit status."""
    return run_command("fastbyol-torchrun", partial(launch, argv))


def launch(argv: Sequence[str] | None) -> int:
    """Run torchrun; return 0, 75 after a signal, which it hands to the ranks, or the status of the first rank to fail.

    A rank that was killed counts as lost.
    """
    try:
        args = run.parse_args(list(sys.argv[1:] if argv is None else argv))  # type: ignore[no-untyped-call]
        run.run(args)  # type: ignore[no-untyped-call]
    except SignalException as error:
        print(f"fastbyol-torchrun: {error.sigval.name} ended the ranks", file=sys.stderr)
        return INTERRUPTED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"with status {failure.exitcode}" if failure.exitcode > 0 else f"by signal {-failure.exitcode}"
        print(f"fastbyol-torchrun: rank {rank} ended {how}", file=sys.stderr)
        return max(failure.exitcode, RANK_LOST)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
