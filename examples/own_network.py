"""Bring your own network: per-view batch norm, the loss and LARS with its EMA target, on random images.

Usage: python examples/own_network.py 10
"""

import copy
import sys

import torch
from torch import nn

from fastbyol.kernels.byol_loss import byol_loss
from fastbyol.model.batchnorm import BatchNormAct1d, BatchNormAct2d
from fastbyol.optim import LARS, parameter_groups

VIEWS = 2


def head(inputs: int, outputs: int) -> nn.Sequential:
    """Build Linear -> BN -> ReLU -> Linear; the batch norm takes each view as a population of its own."""
    return nn.Sequential(nn.Linear(inputs, 64), BatchNormAct1d(64, views=VIEWS), nn.Linear(64, outputs, bias=False))


online = nn.Sequential(
    nn.Conv2d(3, 16, 3, stride=2, bias=False),
    BatchNormAct2d(16, views=VIEWS),  # batch norm and ReLU in one operation
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    head(16, 32),
)
predictor = head(32, 32)
target = copy.deepcopy(online).requires_grad_(False)
network = nn.ModuleList([online, predictor])
lars = LARS(
    parameter_groups(network, weight_decay=1e-6, trust=1e-3),
    target_of=dict(zip(online.parameters(), target.parameters(), strict=True)),
)
images = torch.randn(VIEWS * 32, 3, 24, 24)  # [2B, 3, H, W]: all of view 1, then all of view 2
for step in range(int(sys.argv[1])):
    with torch.no_grad():
        projections = target(images)
    loss = byol_loss(predictor(online(images)), projections)
    lars.zero_grad()
    loss.backward()
    lars.set_rates(lr=0.2, tau=0.99)
    lars.step()
    print(f"step {step}: loss {loss.item():.4f}")
