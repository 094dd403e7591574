"""The trained encoder of a run: of its end or, while it has not finished, of its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastbyol.config import Config
from fastbyol.errors import ConfigError
from fastbyol.export import load_fused
from fastbyol.model.parts import Encoder, build_encoder
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder
from fastbyol.weights import online_encoder


class Trained(NamedTuple):
    """A run's configuration, its encoder and its result.

    unfinished: "step" and "progress" of the checkpoint that the encoder comes from, None once the run has finished.
    Until then the result holds what is known of it: "epochs", "images" and "elapsed_s".
    """

    config: Config
    encoder: Encoder
    result: dict[str, Any]
    unfinished: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a score or an export says of where its encoder comes from."""
        return {} if self.unfinished is None else {"unfinished": self.unfinished}


def open_run(folder: RunFolder, *, notify: Callable[[str], None]) -> Trained:
    """Read the encoder of a run; notify: is told in a line where the run has not finished.

    Raises ConfigError for a folder without a run, and for a run that has neither finished nor a checkpoint.
    """
    config = folder.read_config()
    if folder.result.is_file():
        result = folder.read_result()
        return Trained(config, load_fused(folder.encoder, trust=True), result)  # the run's configuration names it
    try:
        state, damaged = checkpoint.load_newest(folder.checkpoints)
    except checkpoint.CheckpointError as error:
        reason = f" ({error})" if checkpoint.exists(folder.checkpoints) else ""
        raise ConfigError(
            f"the run in {folder.path} has not finished; continue it with fastbyol-train --resume, since it has no "
            f"checkpoint to take the encoder from{reason}"
        ) from error
    for line in damaged:
        notify(line)
    encoder, step, progress = _encoder_of(state, config, folder), state["step"], state["progress"]
    notify(f"the run in {folder.path} has not finished: this is its encoder after step {step}, {progress:.0%} of it")
    images = step * config.recipe.batch_size
    result = {"epochs": images / state["images"], "images": images, "elapsed_s": state["elapsed_s"]}
    return Trained(config, encoder, result, {"step": step, "progress": progress})


def _encoder_of(state: dict[str, Any], config: Config, folder: RunFolder) -> Encoder:
    encoder = build_encoder(config.recipe.encoder, seed=None)
    try:
        encoder.load_state_dict(online_encoder(state))
    except (KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{folder.checkpoints} holds no encoder of the network that config.json names ({reason}); give the folder "
            "of another run"
        ) from error
    return encoder.eval()
