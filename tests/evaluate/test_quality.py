"""Laws of measures without labels: each is its paper's formula, and is what the formula says at its extremes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.cli.eval import main
from fastbyol.cli.train import main as train
from fastbyol.errors import ConfigError
from fastbyol.evaluate import quality
from tests.conftest import Betons
from tests.support.runs import arguments
from tests.support.tolerances import FLOAT32_BATCHNORM, FLOAT64_RTOL

SIZES = [(2, 1), (5, 7), (40, 12), (33, 33)]  # fewer images than features, more, as many


def drawn(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Draw representations with unequal spread and a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, columns, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * spread + 0.3


def shares_of(matrix: NDArray[np.float64]) -> list[float]:
    """Return the singular values over their sum, from the eigenvalues of the smaller Gram matrix."""
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    values = [math.sqrt(max(value, 0.0)) for value in np.linalg.eigvalsh(gram)]
    return [value / sum(values) for value in values]


@pytest.mark.parametrize("size", SIZES)
def test_rankme_is_its_papers_formula(size: tuple[int, int]) -> None:
    z = drawn(*size)
    shares = [share + 1e-7 for share in shares_of(z.numpy())]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert quality.rankme(torch.linalg.svdvals(z)) == pytest.approx(expected, rel=1e-6)  # roots of rounded squares


@pytest.mark.parametrize("size", SIZES)
def test_effective_rank_is_its_papers_formula(size: tuple[int, int]) -> None:
    z = drawn(*size)
    expected = math.exp(-sum(share * math.log(share) for share in shares_of(z.numpy()) if share > 0))
    assert quality.effective_rank(torch.linalg.svdvals(z)) == pytest.approx(expected, rel=1e-6)


def unit(row: NDArray[np.float64]) -> NDArray[np.float64]:
    return row / math.sqrt(sum(value * value for value in row))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("size", SIZES)
def test_alignment_is_its_papers_formula(size: tuple[int, int], alpha: float) -> None:
    first, second = drawn(*size), drawn(*size, seed=1)
    distances = [math.dist(unit(a), unit(b)) for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    expected = sum(distance**alpha for distance in distances) / len(distances)
    assert quality.alignment(first, second, alpha=alpha) == pytest.approx(expected, rel=FLOAT64_RTOL)


@pytest.mark.parametrize("chunk", [1 << 23, 100, 1])
@pytest.mark.parametrize("size", SIZES)
def test_uniformity_is_its_papers_formula(size: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "SIMILARITIES", chunk)
    z = drawn(*size)
    pairs = itertools.combinations([unit(row) for row in z.numpy()], 2)
    potentials = [math.exp(-2 * math.dist(a, b) ** 2) for a, b in pairs]
    expected = math.log(sum(potentials) / len(potentials))
    assert quality.uniformity(z) == pytest.approx(expected, rel=FLOAT64_RTOL, abs=1e-12)
    assert quality.uniformity(z.float()) == pytest.approx(expected, abs=FLOAT32_BATCHNORM)


@pytest.mark.parametrize("size", SIZES)
def test_the_roots_of_a_gram_matrix_give_the_same_measures(size: tuple[int, int]) -> None:
    z = drawn(*size)
    exact, quick = (quality.measure(z, (z, z), spectrum=s) for s in (torch.linalg.svdvals, quality.roots_of_gram))
    assert quick == pytest.approx(exact, rel=1e-5)  # roots of rounded squares


def test_ranks_count_equal_directions() -> None:
    for count in (1, 3, 8):
        equal = torch.tensor([2.0] * count + [0.0] * (8 - count), dtype=torch.float64)
        assert quality.effective_rank(equal) == pytest.approx(count)
        assert quality.rankme(equal) == pytest.approx(count, rel=2e-5)  # what epsilon adds


def test_a_shift_and_a_scale_change_what_they_should() -> None:
    z = drawn(40, 12)
    plain, scaled, shifted = (quality.measure(each, (each, each)) for each in (z, 3 * z, z + 100))
    assert scaled == pytest.approx(plain)
    assert plain.alignment == 0
    assert shifted.effective_rank == pytest.approx(plain.effective_rank)
    assert shifted.rankme < plain.rankme
    assert plain.uniformity < shifted.uniformity < 0


def test_a_collapsed_encoder_is_named() -> None:
    with pytest.raises(ConfigError, match="the encoder has collapsed"):
        quality.measure(torch.ones(4, 3), (torch.ones(4, 3), torch.ones(4, 3)))


def test_the_command_needs_no_labels_and_repeats(
    betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(arguments(betons, run, "--epochs=1")) == 0
    capsys.readouterr()
    asked = ["quality", str(run), f"--train={betons.unlabelled}", "--images=30", "--device=cpu"]
    assert main([*asked, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["train"] == scores["val"] == str(betons.unlabelled)
    for name in ("trained", "random_init"):
        found = quality.Quality(**scores[name])
        assert found.images == 30
        assert 1 < found.effective_rank <= 30
        assert 1 < found.rankme <= 30
        assert 0 < found.alignment < 4
        assert -4 < found.uniformity < 0
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == scores
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert said.startswith("quality RankMe: ")
    assert "%" not in said
    assert main(["export", str(run), str(tmp_path / "out" / "e.pth"), "--format=pth"]) == 0
    assert f"| quality | RankMe {scores['trained']['rankme']:.1f} |" in (tmp_path / "out" / "model-card.md").read_text()
    assert main([*asked[:3], "--images=1"]) == 2
    assert "need at least 2" in capsys.readouterr().err
