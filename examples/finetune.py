"""Fine-tune the encoder of a run with a linear layer on labels, in plain torch; prints the loss and the accuracy.

Usage: python examples/finetune.py RUN_DIR TRAIN.beton VAL.beton 300
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastbyol
from fastbyol.beton import Reader
from fastbyol.evaluate.images import InputSettings, center_views, random_crops, shuffled_batches

run, train_path, val_path, steps = *sys.argv[1:4], int(sys.argv[4])
inputs = InputSettings(px=32, margin=1.0)  # images come decoded, cropped to 32 px and normalised, [N, 3, 32, 32]
with Reader(train_path) as train, Reader(val_path) as val:
    train_labels, val_labels = torch.from_numpy(train.labels), torch.from_numpy(val.labels)
    encoder = fastbyol.load_encoder(run)  # an ordinary torch.nn.Module
    network = nn.Sequential(encoder, nn.Linear(encoder.features, int(train_labels.max()) + 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = shuffled_batches(np.arange(len(train)), batch=64, steps=steps, seed=0)
    network.train()
    for step, (images, indices) in enumerate(random_crops(train, rows, inputs, seed=0)):
        loss = F.cross_entropy(network(images), train_labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    network.eval()
    with torch.inference_mode():
        guesses = [network(images).argmax(1) for images, _ in center_views(val, np.arange(len(val)), inputs)]
print(f"top-1 {100 * (torch.cat(guesses) == val_labels).float().mean():.1f} %")
