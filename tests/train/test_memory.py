"""Laws of the memory plan: what is predicted for a step, and how a step is split until it fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.cli.train import main
from fastbyol.config import Config, Recipe
from fastbyol.errors import ConfigError
from fastbyol.model import batchnorm
from fastbyol.model.byol import BYOL, Output
from fastbyol.monitor.metrics import read_metrics
from fastbyol.recipes import named
from fastbyol.storage.run_folder import RunFolder
from fastbyol.train import memory, micro_batches, step
from tests.conftest import Betons
from tests.support.commands import arguments

CARD_80 = memory.usable_bytes(round(78.5 * memory.GIB))  # an 80 GB card less what CUDA takes for itself


def small(**changes: object) -> Recipe:
    recipe = named("demo+stem=imagenet")
    return replace(recipe, crop_px=64, **changes)  # type: ignore[arg-type]


def test_a_resnet50_step_at_224_px_needs_what_its_tensors_are() -> None:
    """Pinned, so that a change of what is kept is seen: docs/performance.md has it by kind."""
    needed = memory.step_bytes(named("imagenet_rn50"), images=512, precision="bfloat16") / memory.GIB
    assert needed == pytest.approx(42.8, rel=0.01)


def test_recomputing_brings_it_under_40_gib() -> None:
    needed = memory.step_bytes(named("imagenet_rn50"), images=512, precision="bfloat16", recomputes=True) / memory.GIB
    assert needed < 40


@pytest.mark.parametrize("parts", [1, 2])
def test_adamw_needs_a_second_moment_of_every_trainable_parameter(parts: int) -> None:
    of_lars, of_sgd, of_adamw = (
        memory.step_bytes(named(f"demo+optimizer={name}"), images=64, parts=parts, precision="float32")
        for name in ("lars", "sgd", "adamw")
    )
    recipe = named("demo")
    model = BYOL(recipe.encoder, recipe.head, seed=0)
    assert of_lars == of_sgd
    assert of_adamw - of_lars == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_convolutions_that_compute_statistics_keep_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = []
    for joins in (False, True):
        monkeypatch.setattr(batchnorm.BatchNormAct2d, "joins_convolution", joins)
        monkeypatch.setattr(batchnorm.BatchNormAddReLU2d, "joins_convolution", joins)
        needed.append(memory.step_bytes(named("imagenet_rn50"), images=8, precision="bfloat16"))
    assert needed[0] == needed[1]


@pytest.mark.parametrize(
    ("settings", "images", "side"),
    [
        ({}, 2 * 32, 32),
        ({"loader": "memory"}, 160, 32),
        ({"loader": "memory", "memory_side": 20}, 160, 20),
        ({"loader": "nvjpeg"}, (2 + 6) * 32, 32),
    ],
)
def test_decoded_images_on_the_gpu_are_counted_in_the_size_they_are_kept(
    betons: Betons, settings: dict[str, Any], images: int, side: int
) -> None:
    config = Config(small(), data=str(betons.train), epochs=300, device="cpu", **settings)
    with Reader(betons.train) as train:
        assert micro_batches.pixel_bytes(config, train, images=32, free=80 * memory.GIB) == images * 3 * side**2
        crowded = replace(config, loader="memory", memory_side=20)  # 192 kB, of which half of this is less
        assert micro_batches.pixel_bytes(crowded, train, images=32, free=250_000) == 2 * 32 * 3 * 20**2


def test_need_is_linear_in_images_and_halves_in_bfloat16() -> None:
    need = {
        (images, precision): memory.step_bytes(small(), images=images, precision=precision)
        for images in (64, 128, 192)
        for precision in ("float32", "bfloat16")
    }
    for precision in ("float32", "bfloat16"):
        steps = [need[128, precision] - need[64, precision], need[192, precision] - need[128, precision]]
        assert steps[0] == pytest.approx(steps[1], rel=1e-3)
        assert steps[0] > 0
    assert need[192, "float32"] - need[64, "float32"] == pytest.approx(
        2 * (need[192, "bfloat16"] - need[64, "bfloat16"]), rel=0.05
    )


def test_the_readmes_imagenet_line_fits_one_80_gb_card() -> None:
    found = memory.fit(named("imagenet_rn50"), images=4096, precision="bfloat16", usable_bytes=CARD_80)
    assert 4096 // found.parts >= 512
    assert found.step_bytes <= CARD_80 < found.whole_bytes
    said = str(found)
    assert f"{found.parts} micro-batches of {4096 // found.parts} images" in said
    assert f"batch norm's population is {4096 // found.parts} images, not 4096" in said
    assert "\n" not in said


def test_what_fits_is_not_split_and_says_so() -> None:
    found = memory.fit(named("imagenet_rn50_b512_e1000"), images=512, precision="bfloat16", usable_bytes=CARD_80)
    assert (found.parts, found.recomputes) == (1, False)
    assert "micro" not in str(found)


def test_splitting_stops_at_the_first_number_that_fits() -> None:
    recipe = small()
    one = memory.step_bytes(recipe, images=96, parts=1, precision="float32")
    for parts in (2, 3, 6):
        usable = memory.step_bytes(recipe, images=96, parts=parts, precision="float32")
        found = memory.fit(recipe, images=96, precision="float32", usable_bytes=usable)
        assert found.parts <= parts
        assert found.step_bytes <= usable < one
    least = memory.fit(recipe, images=96, precision="float32", usable_bytes=one, least_parts=5)
    assert least.parts == 6  # the next that divides 96


def test_what_cannot_be_split_is_refused_in_one_line() -> None:
    for recipe, why in ((small(), "smaller --batch-size"), (small(lagged_target=True), "lagged target")):
        with pytest.raises(ConfigError, match=why):
            memory.fit(recipe, images=96, precision="float32", usable_bytes=2**20)


def test_errors_of_the_gpus_libraries_count_as_out_of_memory() -> None:
    for said in (
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "FIND was unable to find an engine to execute this computation",
    ):
        assert memory.is_out_of_memory(RuntimeError(said))
    after = RuntimeError("operation failed due to a previous error during capture")
    after.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert memory.is_out_of_memory(after)
    assert not memory.is_out_of_memory(RuntimeError("expected a tensor"))


def limited(monkeypatch: pytest.MonkeyPatch, *, images: int, first: int = 0) -> list[int]:
    """Let every step but the `first` ones run out of memory on more than `images` images, as a GPU's would."""
    backward, sizes = step.Eager._backward, []

    def allocating(engine: step.Eager, views: Tensor, *, weight: float = 1.0) -> Output:
        sizes.append(len(views) // 2)
        if len(sizes) > first and len(views) > 2 * images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.\nmore of it")
        return backward(engine, views, weight=weight)

    monkeypatch.setattr(step.Eager, "_backward", allocating)
    return sizes


@pytest.mark.parametrize("first", [0, 4], ids=["at once", "after some steps"])
def test_a_run_that_runs_out_of_memory_goes_on_in_smaller_parts(
    first: int, betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = limited(monkeypatch, images=16, first=first)
    asked = arguments(betons, tmp_path / "run", "--epochs=3", "--checkpoint-every=0.01s")
    assert main(asked) == 0
    assert set(sizes[first + 3 :]) == {16}
    said = capsys.readouterr().err
    assert "memory ran out (CUDA out of memory. Tried to allocate 7.00 GiB.)" in said
    assert "3 micro-batches of 16 images, each a population" in said
    assert RunFolder(tmp_path / "run").read_config().micro_batches == 3
    result = json.loads(RunFolder(tmp_path / "run").result.read_text())
    assert result["micro_batches_from_step"][-1][1] == 3
    assert "memory ran out" in RunFolder(tmp_path / "run").report.read_text()
    rows = read_metrics(RunFolder(tmp_path / "run").metrics)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows == sorted(rows, key=lambda row: row["elapsed_s"])


PINNED = (["--micro-batches=2"], "--micro-batches 3")


@pytest.mark.parametrize(("more", "advice"), [PINNED, ([], "smaller --batch-size")], ids=["pinned", "open"])
def test_what_still_does_not_fit_ends_with_one_line(
    more: list[str],
    advice: str,
    betons: Betons,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limited(monkeypatch, images=16 if more else 1)
    assert main(arguments(betons, tmp_path / "run", "--epochs=1", *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert advice in errors[0]
    assert not RunFolder(tmp_path / "run").result.exists()


def test_a_resumed_run_keeps_its_parts(betons: Betons, tmp_path: Path) -> None:
    asked = arguments(betons, tmp_path / "run", "--epochs=1")
    assert main([*asked, "--micro-batches=2"]) == 0
    RunFolder(tmp_path / "run").result.unlink()
    assert main([*asked, "--resume"]) == 0
    assert RunFolder(tmp_path / "run").read_config().micro_batches == 2
    RunFolder(tmp_path / "run").result.unlink()
    assert main([*asked, "--resume", "--micro-batches=3"]) == 2


def test_the_plan_of_a_card_is_said_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["imagenet_rn50", "--plan", "80"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("imagenet_rn50: a step of 4096 images needs 3")
    assert "4 micro-batches of 1024 images" in said
    assert main(["imagenet_rn50", "--plan", "80", "--batch-size=512"]) == 0
    assert "micro" not in capsys.readouterr().out
    assert main(["imagenet_rn50", "--plan", "8", "--lagged-target"]) == 2
    for parts in ("0", "-1", "3"):
        assert main(["demo", "--plan", "80", f"--micro-batches={parts}"]) == 2
        assert "equal micro-batches" in capsys.readouterr().err


def test_the_plan_of_a_card_reads_a_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["imagenet_rn50_b512_e1000", "--micro-batches=4", "--precision=float32"]
    assert main([*asked, "--plan", "80"]) == 0
    flags = capsys.readouterr().out
    assert main([*asked, "--save-config", str(tmp_path / "run.toml")]) == 0
    capsys.readouterr()
    assert main(["--config", str(tmp_path / "run.toml"), "--plan", "80"]) == 0
    assert capsys.readouterr().out == flags
    (tmp_path / "auto.toml").write_text('recipe = "cifar10_tiny"\nmethod = "auto"\n')
    assert main(["--config", str(tmp_path / "auto.toml"), "--plan", "80"]) == 0
    assert "optimizer=muon" in capsys.readouterr().out
