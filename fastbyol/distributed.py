"""Know the ranks of a run: who this process is among those torchrun started, and how they agree."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastbyol.config import ConfigError

HOST_TIMEOUT = timedelta(days=1)  # of ranks that wait for rank 0's evaluation; a rank that dies is noticed at once
DEVICE_TIMEOUT = timedelta(
    minutes=10
)  # for the devices, which only wait for one another's steps; compilation is the longest
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
CLOSE_TIMEOUT_S = 1.0
POLL_S = 0.05


class RankLost(RuntimeError):
    """Tell that another rank has ended, so that this one cannot go on."""


@dataclass(frozen=True)
class World:
    """Say which of how many ranks this process is; the default is one process alone.

    `local_ranks` of them run on this machine. `group` joins the ranks' devices: gradients and batch-norm statistics;
    `control` joins their hosts (gloo): the clock and every decision that all must take alike. Both are None for one
    process.
    """

    rank: int = 0
    ranks: int = 1
    local_ranks: int = 1
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Tell whether this rank writes, measures and decides."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Give the sum of each value over all ranks (the hosts wait for one another; at once for one process)."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        totals: list[float] = tensor.tolist()
        return totals

    def from_main(self, value: Any) -> Any:
        """Give rank 0's value to all ranks; the others wait for it and ignore their own."""
        if self.control is None:
            return value
        carried = [value]
        dist.broadcast_object_list(carried, src=0, group=self.control)
        return carried[0]

    @contextmanager
    def detect_lost_ranks(self) -> Iterator[None]:
        """Turn what a collective says when a rank has ended into RankLost."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo raises RuntimeError, named by its path
                raise self._lost(error) from error
            raise

    def _lost(self, error: RuntimeError) -> RankLost:
        reason = str(error).partition("\n")[0]
        return RankLost(
            f"rank {self.rank} of {self.ranks} stops, since another rank has ended: see its error ({reason})"
        )


def ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Give the number of ranks torchrun started, 1 without it."""
    return int(environment.get("WORLD_SIZE", "1"))


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Give this process's place among the ranks, 0 without torchrun."""
    return int(environment.get("RANK", "0"))


def local_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Give the number of ranks torchrun started on this machine, 1 without it."""
    return int(environment.get("LOCAL_WORLD_SIZE", "1"))


def _rendezvous_prefix(store: Store, place: int, count: int) -> str:
    """Agree with the ranks that are here now on a name for this meeting.

    torchrun keeps one store over its restarts, and with it the addresses of ranks that are gone; its own count of
    restarts can differ from machine to machine. So each rank shows a word that no one else can know, rank 0 collects
    them into a roster, and all go when every rank has found its own word in the same roster.
    """
    word, deadline_s = uuid4().hex, time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds()
    store.set(f"word-{place}", word)
    words, seen = [f"word-{rank}" for rank in range(count)], [f"seen-{rank}" for rank in range(1, count)]
    roster = ""
    while time.monotonic() < deadline_s:
        if place == 0 and store.check(words):
            roster = ",".join(store.get(name).decode() for name in words)
            store.set("roster", roster)
            if store.check(seen) and all(store.get(name).decode() == roster for name in seen):
                store.set("go", roster)
                return roster
        elif place and store.check(["roster"]):
            roster = store.get("roster").decode()
            if roster.split(",")[place : place + 1] == [word]:
                store.set(f"seen-{place}", roster)
                if store.check(["go"]) and store.get("go").decode() == roster:
                    return roster
        time.sleep(POLL_S)
    raise RankLost(
        f"rank {place} of {count} waited {RENDEZVOUS_TIMEOUT} for the others, which did not come; start them all"
    )


def _close_connections() -> None:
    """Close the ranks' connections, but wait for that CLOSE_TIMEOUT_S at most: NCCL has been seen to hang there.

    Source: pytorch issue 115388, after captured collectives. A deadline holds whatever becomes of the connections.
    """
    leaving = threading.Thread(target=dist.destroy_process_group, name="leave", daemon=True)
    leaving.start()
    leaving.join(CLOSE_TIMEOUT_S)
    if leaving.is_alive():
        late = f"did not close within {CLOSE_TIMEOUT_S:g} s and are left open"
        print(f"warning: the run is done, but the ranks' connections {late}", file=sys.stderr)


@contextmanager
def join_ranks(device: str, environment: Mapping[str, str] = os.environ) -> Iterator[World]:
    """Join the ranks that torchrun started, as its environment variables say; alone without them.

    With device "cuda" each rank takes the GPU of its local rank. Raises ConfigError where a machine has fewer GPUs.
    """
    if ranks(environment) == 1:
        yield World()
        return
    if device == "cuda":
        local = int(environment["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local}, but this machine has {torch.cuda.device_count()} GPUs; "
                "give torchrun --nproc-per-node that number"
            )
        torch.cuda.set_device(local)
    store, place, count = next(rendezvous("env://"))
    store = PrefixStore(_rendezvous_prefix(store, place, count), store)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place, world_size=count, timeout=DEVICE_TIMEOUT)
    world = World(
        place,
        count,
        local_ranks(environment),
        dist.group.WORLD,
        dist.new_group(backend="gloo", timeout=HOST_TIMEOUT),
    )
    with world.detect_lost_ranks():
        yield world
    _close_connections()  # not after an error: it could wait for ranks that are gone
