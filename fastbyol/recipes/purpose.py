"""What recipes are meant for: the data and the hardware of each, beside its function."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastbyol.config import Recipe

CPU = "1 CPU, minutes"
ONE_GPU = "1 GPU"
# An 80 GB card holds a step of 512 images of ResNet-50 at 224 px, which eight make 4096; alone it takes 4096 in four
# parts, each a population of batch norm (docs/performance.md, Memory).
MANY_GPUS = "8 GPUs or more"


class Purpose(NamedTuple):
    """The data set that a recipe's constants were chosen for, and the hardware."""

    data: str
    hardware: str


PURPOSES: dict[str, Purpose] = {}
Build = Callable[[], Recipe]


def meant_for(data: str, hardware: str) -> Callable[[Build], Build]:
    """Record the purpose of the recipe whose function this decorates."""

    def record(build: Build) -> Build:
        PURPOSES[build.__name__] = Purpose(data, hardware)
        return build

    return record
