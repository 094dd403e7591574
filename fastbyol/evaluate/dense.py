"""Know dense transfer: a fully convolutional head on the encoder's last map, tuned on masks, scored by mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastbyol.config import require
from fastbyol.encoder import BasicBlock, Bottleneck, ResNet, init_
from fastbyol.evaluate.finetune import Plan, copy_of, descend
from fastbyol.evaluate.images import Lens
from fastbyol.evaluate.masks import IGNORED, Pair, read, varied

STEPS = 30_000  # these constants: He et al. 2020 (MoCo), appendix; see docs/numerics.md for the paper's
LR = 3e-3
BATCH = 16
WEIGHT_DECAY = 1e-4
CROP_PX = 513
STRIDE = 16
HEAD_CHANNELS, HEAD_DILATION = 256, 6


def dilate_(encoder: ResNet, stride: int) -> None:
    """Lower the encoder's output stride: the last groups keep their size, and their 3x3 convolutions spread instead.

    The first block of such a group spreads as the group before does, the others by the new rate, as in torchvision.
    Raises ConfigError for a stride that the encoder cannot have.
    """
    stem = int(encoder.conv1.stride[0]) * (2 if isinstance(encoder.maxpool, nn.MaxPool2d) else 1)
    strides = [stem * 2**n for n in range(len(encoder.stages))]
    require(stride in strides, f"output stride {stride}; this encoder can have {', '.join(map(str, strides))}")
    for number in range(strides.index(stride) + 1, len(strides)):
        rate = strides[number] // stride
        for index, block in enumerate(encoder.get_submodule(encoder.stages[number]).children()):
            assert isinstance(block, BasicBlock | Bottleneck)
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.stride = (1, 1)
                    if conv.kernel_size == (3, 3):
                        spread = rate // 2 if index == 0 and conv is _strided(block) else rate
                        conv.dilation = conv.padding = (spread, spread)


def _strided(block: BasicBlock | Bottleneck) -> nn.Conv2d:
    return block.conv1 if isinstance(block, BasicBlock) else block.conv2


class Segmenter(nn.Module):
    """An encoder with two dilated 3x3 convolutions and a 1x1: images [N, 3, H, W] to logits [N, classes, H, W]."""

    def __init__(self, encoder: ResNet, classes: int, *, stride: int, seed: int) -> None:
        super().__init__()
        dilate_(encoder, stride)
        self.encoder = encoder
        layers: list[nn.Module] = []
        inputs = encoder.features
        for _ in range(2):
            conv = nn.Conv2d(inputs, HEAD_CHANNELS, 3, 1, HEAD_DILATION, HEAD_DILATION, bias=False)
            layers += [conv, nn.BatchNorm2d(HEAD_CHANNELS), nn.ReLU()]
            inputs = HEAD_CHANNELS
        self.head = nn.Sequential(*layers, nn.Conv2d(inputs, classes, 1))
        init_(self.head, torch.Generator().manual_seed(seed))

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits of every pixel."""
        logits = self.head(self.encoder.feature_map(images))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def mean_iou(confusion: Tensor) -> float:
    """Return the mean intersection over union in percent of a confusion matrix [C, C], true class by row.

    A class that neither occurs nor is guessed does not count.
    """
    both = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * (both / union.clamp_min(1))[union > 0].mean().item()


@torch.inference_mode()
def confusion_of(network: Segmenter, found: Sequence[Pair], *, classes: int, lens: Lens) -> Tensor:
    """Count pixels of whole images by true and guessed class: int64 [C, C]; ignored pixels are left out."""
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    bar = tqdm(found, desc="segment val", unit="images", delay=2, leave=False, disable=None)
    for pair in lens.threads.units(bar, "segment val"):
        image, mask = read(pair)
        with lens.precision():
            guessed = network(image[None].to(lens.device))[0].argmax(0).cpu()
        counted = mask != IGNORED
        counts += torch.bincount(mask[counted] * classes + guessed[counted], minlength=classes * classes)
    return counts.view(classes, classes)


def score(
    encoder: ResNet,
    found: tuple[Sequence[Pair], Sequence[Pair]],
    *,
    classes: int,
    plan: Plan,
    stride: int = STRIDE,
    lens: Lens,
    seed: int = 0,
    label: str = "segment",
) -> dict[str, Any]:
    """Tune encoder and head on the first pairs, by cross-entropy a pixel; score mean IoU on the second, whole images.

    lens.px is the side of a training crop. The rate falls as a cosine, where the paper's falls in two steps.
    """
    train, val = found
    network = Segmenter(copy_of(encoder), classes, stride=stride, seed=seed).to(lens.device)
    batches = varied(train, px=lens.px, batch=plan.batch, steps=plan.steps, seed=seed, device=lens.device)
    descend(network, batches, _pixel_loss, plan=plan, lens=lens, label=label)
    confusion = confusion_of(network, val, classes=classes, lens=lens)
    right = confusion.diagonal().sum().double() / confusion.sum().clamp_min(1)
    return {"miou": mean_iou(confusion), "pixel_accuracy": 100 * right.item(), "stride": stride, **plan._asdict()}


def _pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Average cross-entropy over the pixels that count; 0 where a batch has none."""
    return F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum") / (masks != IGNORED).sum().clamp_min(1)


def hold_out(found: Sequence[Pair], *, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Divide pairs where no second folder is given: four fifths to learn from, a fifth to score on."""
    require(len(found) >= 2, f"{len(found)} pairs of image and mask; give at least 2, or --val-images and --val-masks")
    order = np.random.default_rng(seed).permutation(len(found))
    cut = max(len(found) // 5, 1)
    return [found[i] for i in sorted(order[cut:])], [found[i] for i in sorted(order[:cut])]
