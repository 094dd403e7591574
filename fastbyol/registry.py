"""Parts that are chosen by name: ours, those that others register, and any `module:attribute` that can be imported.

A registry names where a part is and imports it when it is used, so that a command line can list and check names without
importing torch. docs/extending.md shows what each kind of part has to look like.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastbyol.errors import ConfigError


class Registry(Mapping[str, str]):
    """The parts of one kind: a mapping from name to "module:attribute".

    kind: what the parts are, as an error names them ("loader"). libraries: parts of other packages, "timm:NAME": the
    package's name to what builds any of its networks.
    """

    def __init__(self, kind: str, parts: Mapping[str, str], *, libraries: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._parts = dict(parts)
        self._libraries = dict(libraries or {})

    def __getitem__(self, name: str) -> str:
        library, colon, _ = name.partition(":")
        return self._libraries[library] if colon and library in self._libraries else self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def register(self, name: str, target: str) -> None:
        """Give the part at "module:attribute" a name; raise ConfigError for a name that is taken, or another form."""
        if name in self._parts:
            raise ConfigError(f"a second {self.kind} named {name!r}; give it another name")
        if not _is_target(target):
            raise ConfigError(f"{self.kind} {name!r} at {target!r}; give it as module:attribute")
        self._parts[name] = target

    def check(self, name: str) -> str:
        """Return a name that can be looked up: one of the registry's, or "module:attribute"; else raise ConfigError."""
        if name not in self and not _is_target(name):
            known = ", ".join([*self._parts, *(f"{library}:NAME" for library in self._libraries)])
            raise ConfigError(f"no {self.kind} {name!r}; choose one of {known}, or give your own as module:attribute")
        return name

    def find(self, name: str) -> Any:
        """Import the part of that name, or at "module:attribute"; raise ConfigError where that cannot be done.

        An ImportError from inside one of our own modules is passed on, for the caller to name the missing package.
        """
        target = self.get(self.check(name), name)
        module, _, attribute = target.partition(":")
        here = str(Path.cwd())
        if name not in self and not {"", here} & set(sys.path):
            sys.path.append(here)  # a console command's path lacks the folder it is started in
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if name in self:
                raise
            raise ConfigError(
                f"{self.kind} {name!r} cannot be imported ({error}); give module:attribute of a module in this folder "
                "or on PYTHONPATH"
            ) from error

    def build(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the part of that name; raise ConfigError as find does, and where it does not take these arguments.

        What the part itself raises is passed on, with the lines of its module.
        """
        part = self.find(name)
        try:
            inspect.signature(part).bind(*args, **kwargs)
        except (TypeError, ValueError) as error:
            given = ", ".join([*("..." for _ in args), *(f"{key}=..." for key in kwargs)])
            raise ConfigError(
                f"{self.kind} {name!r} cannot be called as ({given}): {error}; see docs/extending.md"
            ) from error
        return part(*args, **kwargs)


def _is_target(text: str) -> bool:
    module, colon, attribute = text.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


ENCODERS = Registry(
    "encoder",
    dict.fromkeys(
        ("resnet8", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"),
        "fastbyol.model.resnet:build",
    ),
    libraries={
        "timm": "fastbyol.model.libraries:build_timm",
        "torchvision": "fastbyol.model.libraries:build_torchvision",
    },
)
OBJECTIVES = Registry(
    "objective",
    {
        "byol": "fastbyol.model.objective:Objective",
        "vicreg": "fastbyol.model.decorrelation:VICReg",
        "coding-rate": "fastbyol.model.decorrelation:CodingRate",
    },
)
OPTIMIZERS = Registry(
    "optimizer",
    {
        "lars": "fastbyol.optim.lars:build",
        "sgd": "fastbyol.optim.lars:build_sgd",
        "muon": "fastbyol.optim.muon:Muon",
        "adamw": "fastbyol.optim.adamw:AdamW",
        "apex-larc": "fastbyol.optim.larc:LARC",
    },
)
LOADERS = Registry(
    "loader",
    {
        "native": "fastbyol.loaders.native:load",
        "memory": "fastbyol.loaders.memory:load",
        "ffcv": "fastbyol.loaders.ffcv:load",
        "dali": "fastbyol.loaders.dali:load",
        "nvjpeg": "fastbyol.loaders.nvjpeg:load",
    },
)
PROTOCOLS = Registry(
    "protocol",
    {
        "knn": "fastbyol.evaluate.knn:PROTOCOL",
        "linear": "fastbyol.evaluate.linear:PROTOCOL",
        "semi": "fastbyol.evaluate.semi_supervised:PROTOCOL",
        "transfer": "fastbyol.evaluate.linear_transfer:PROTOCOL",
        "finetune": "fastbyol.evaluate.finetune:PROTOCOL",
        "segment": "fastbyol.evaluate.segmentation:PROTOCOL",
        "quality": "fastbyol.evaluate.quality:PROTOCOL",
    },
)
PROTOCOL_SUMMARIES = {  # for fastbyol-eval --help, which imports no protocol
    "knn": "nearest neighbours by cosine, weighted and plain",
    "linear": "a linear classifier, its learning rate chosen on held-out training images",
    "semi": "fine-tuning on a class-balanced part of the labels, beside the same network from scratch",
    "transfer": "logistic regression by L-BFGS, its penalty chosen on held-out training images",
    "finetune": "fine-tuning on all labels, rate and decay chosen on held-out training images",
    "segment": "semantic segmentation by a convolutional head, from images and masks",
    "quality": "RankMe, effective rank, alignment and uniformity of the representations, without labels",
}
