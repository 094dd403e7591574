"""Laws of segmentation: dilation that only adds positions, mean IoU by its definition, masks that belong to images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.evaluate import masks, segmentation
from fastbyol.evaluate.finetune import HParams
from fastbyol.evaluate.images import InputSettings
from fastbyol.model.resnet import build


def draw(folder: Path, count: int, *, seed: int) -> tuple[Path, Path]:
    """Draw grey noise with one bright square, and masks of where it is; a rim is ignored."""
    rng = np.random.default_rng(seed)
    images, drawn = folder / f"images{seed}", folder / f"masks{seed}"
    images.mkdir()
    drawn.mkdir()
    for n in range(count):
        pixels, mask = rng.integers(0, 90, (40, 48, 3)).astype(np.uint8), np.zeros((40, 48), np.uint8)
        top, left = rng.integers(0, 16, 2)
        mask[top : top + 22, left : left + 22] = 255
        mask[top + 1 : top + 21, left + 1 : left + 21] = 1
        pixels[mask > 0] += 150
        Image.fromarray(pixels).save(images / f"{n}.png")
        Image.fromarray(mask).save(drawn / f"{n}.png")
    return images, drawn


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stride", [16, 8])
def test_a_dilated_encoder_adds_positions_and_keeps_the_rest(arch: str, stride: int) -> None:
    encoder = build(EncoderConfig(arch, width=1 / 16), seed=0, views=1)
    encoder(torch.randn(8, 3, 64, 64))  # moves the running statistics
    dilated = encoder.with_views(1).eval()
    segmentation.dilate_(dilated, stride)
    images = torch.randn(2, 3, 96, 128)
    coarse, fine = encoder.eval().feature_map(images), dilated.feature_map(images)
    assert fine.shape[2:] == (96 // stride, 128 // stride)
    torch.testing.assert_close(fine[:, :, :: 32 // stride, :: 32 // stride], coarse, rtol=1e-4, atol=1e-5)


def test_a_stride_that_no_group_ends_at_is_refused() -> None:
    with pytest.raises(ConfigError, match="output stride is 5; this encoder can have 4, 8, 16, 32"):
        segmentation.dilate_(build(EncoderConfig("resnet18", width=1 / 16), seed=0), 5)


def test_mean_iou_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    true, guessed = (torch.randint(3, (500,), generator=generator) for _ in range(2))
    confusion = torch.bincount(true * 4 + guessed, minlength=16).view(4, 4)  # class 3 never occurs
    each = [((true == c) & (guessed == c)).sum().item() / ((true == c) | (guessed == c)).sum().item() for c in range(3)]
    assert segmentation.mean_iou(confusion) == pytest.approx(100 * np.mean(each))


def test_segmentation_learns_squares(tmp_path: Path) -> None:
    train, val = (masks.find_pairs(*draw(tmp_path, count, seed=seed)) for count, seed in ((12, 0), (4, 1)))
    encoder = build(EncoderConfig("resnet8", width=0.125, stem="cifar_stride2"), seed=0)
    hparams = HParams(lr=0.02, weight_decay=1e-4, steps=30, batch=4)
    score = segmentation.score(
        encoder, (train, val), classes=2, hparams=hparams, stride=4, inputs=InputSettings(40, 1.0)
    )
    assert score["miou"] > 65  # all background: under 40
    assert score["pixel_accuracy"] > 80


def test_a_varied_pair_stays_aligned(tmp_path: Path) -> None:
    pair = masks.find_pairs(*draw(tmp_path, 1, seed=0))[0]
    image, mask = masks.read_pair(pair)
    rng = np.random.default_rng(0)
    for _ in range(8):
        x, y = masks.augment(image, mask, rng.random(4, dtype=np.float32), px=36)
        assert x.shape == (3, 36, 36)
        assert y.shape == (36, 36)
        bright = x.mean(0)
        assert bright[y == 1].mean() > bright[y == 0].mean() + 1


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("missing folder", "is not a folder"),
        ("no image", "holds no image"),
        ("alone", "1 names occur in only one"),
        ("other size", "give masks of their images' sizes"),
        ("colours", "one channel or a palette"),
        ("broken", "cannot be read"),
        ("broken chunk", "1.png cannot be read"),
        ("ignored", "hold only 255"),
    ],
)
def test_masks_that_do_not_serve_are_refused(case: str, expected: str, tmp_path: Path) -> None:
    images, drawn = draw(tmp_path, 2, seed=0)
    if case == "missing folder":
        drawn = tmp_path / "none"
    elif case == "no image":
        for path in images.iterdir():
            path.unlink()
    elif case == "alone":
        (drawn / "0.png").unlink()
    elif case == "broken chunk":
        whole = (images / "1.png").read_bytes()
        (images / "1.png").write_bytes(whole[:33] + b"\xff" * 40 + whole[73:])
    elif case == "broken":
        (images / "1.png").write_bytes(b"no image")
    else:
        made = {
            "other size": np.zeros((4, 5), np.uint8),
            "colours": np.zeros((40, 48, 3), np.uint8),
            "ignored": np.full((40, 48), 255, np.uint8),
        }[case]
        for path in drawn.iterdir():
            Image.fromarray(made).save(path)
    with pytest.raises(ConfigError, match=expected):
        masks.find_classes(masks.find_pairs(images, drawn))
