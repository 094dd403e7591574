"""Places of vectors on a map of two dimensions: by principal components, t-SNE or UMAP."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.embed.neighbours import unit_block
from fastbyol.embed.vectors import Vectors
from fastbyol.errors import require

TITLES = {"pca": "principal components", "tsne": "t-SNE", "umap": "UMAP"}
PACKAGES = {"tsne": ("sklearn", "scikit-learn"), "umap": ("umap", "umap-learn")}  # as imported, as installed
ROWS = 8192  # read at a time
IMAGES_MIN = {"tsne": 4, "umap": 16}
COMPONENTS = 50  # that t-SNE and UMAP start from


def require_package(method: str) -> None:
    """Raise ConfigError where the package of a layout is not installed."""
    module, package = PACKAGES.get(method, ("", ""))
    require(
        not module or importlib.util.find_spec(module) is not None,
        f"--layout {method} needs {package}; pip install {package}, or leave out --layout",
    )


def check_number(method: str, images: int) -> None:
    """Raise ConfigError where a layout needs more images."""
    least = IMAGES_MIN.get(method, 0)
    require(images >= least, f"--layout {method} needs at least {least} images, not {images}; leave out --layout")


def lay_out(vectors: Vectors, method: str, *, seed: int, device: str) -> NDArray[np.float32]:
    """Return a place for each vector, float32 [N, 2], from 0 to 1 along the longer side; y points down."""
    check_number(method, len(vectors))
    if method == "pca":
        places = principal_components(vectors, 2, device=device)
    else:
        reduced = principal_components(vectors, COMPONENTS, device=device)
        places = (_tsne if method == "tsne" else _umap)(reduced, seed)
    low, high = places.min(0), places.max(0)
    extent = float((high - low).max()) or 1.0
    centred: NDArray[np.float32] = ((places - (low + high) / 2) / extent + 0.5).astype(np.float32)
    return centred


@torch.inference_mode()
def principal_components(vectors: Vectors, count: int, *, device: str) -> NDArray[np.float32]:
    """Project the vectors, at unit length, on their first principal components: float32 [N, count].

    Each component points to where its largest weight is positive. Missing ones, of short vectors, are 0.
    """
    width = vectors.features
    total = torch.zeros(width, dtype=torch.float64, device=device)
    products = torch.zeros(width, width, dtype=torch.float64, device=device)
    starts = range(0, len(vectors), ROWS)
    for first in starts:
        block = unit_block(vectors, first, first + ROWS, device).double()
        total += block.sum(0)
        products += block.T @ block
    mean = total / len(vectors)
    axes = torch.linalg.eigh(products / len(vectors) - torch.outer(mean, mean)).eigenvectors.flip(1)[:, :count]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    found = [_project(unit_block(vectors, first, first + ROWS, device), mean, axes) for first in starts]
    return np.pad(np.concatenate(found), ((0, 0), (0, max(count - width, 0))))


def _project(block: Tensor, mean: Tensor, axes: Tensor) -> NDArray[np.float32]:
    projected: NDArray[np.float32] = ((block.double() - mean) @ axes).float().cpu().numpy()
    return projected


def _tsne(reduced: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    from sklearn.manifold import TSNE  # noqa: PLC0415 - optional

    perplexity = min(30.0, (len(reduced) - 1) / 3)
    placed: NDArray[np.float32] = TSNE(perplexity=perplexity, random_state=seed, n_jobs=-1).fit_transform(reduced)
    return placed


def _umap(reduced: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    from umap import UMAP  # noqa: PLC0415 - optional

    placed: NDArray[np.float32] = UMAP(random_state=seed, n_jobs=1).fit_transform(reduced)
    return placed
