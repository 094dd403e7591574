"""Write the training loop yourself: fastbyol's loader, views, networks, loss and LARS as parts.

Usage: python examples/own_loop.py TRAIN.beton 20
"""

import sys
from itertools import islice

from fastbyol import optim, schedule, views
from fastbyol.beton import Reader
from fastbyol.loaders import load
from fastbyol.model.byol import BYOL
from fastbyol.order import stream
from fastbyol.recipes import named

path, steps = sys.argv[1], int(sys.argv[2])
recipe = named("demo")
model = BYOL(recipe.encoder, recipe.head, seed=0)
lars = optim.build(model, model.target_of(), recipe.optim)  # its step also moves the target
with Reader(path) as reader:
    schedules = schedule.build(recipe, epochs=steps * recipe.batch_size / len(reader), warmup_max=0.1)
    rows = stream(0, batch_size=recipe.batch_size, count=len(reader), seed=0)
    batches = load("native", reader, rows, workers=2)  # decodes each image once, ahead of the step
    for step, batch in enumerate(islice(batches, steps)):
        drawn = views.draw(recipe.views, seed=0, epochs=batch.epochs, indices=batch.indices, sizes=batch.sizes.numpy())
        images = views.apply(batch.pixels, batch.offsets, batch.sizes, drawn, crop_px=recipe.crop_px)
        loss = model(images).loss
        lars.zero_grad()
        loss.backward()
        progress = step / steps
        lars.set_rates(lr=schedules.learning_rate(progress), tau=schedules.tau(progress))
        lars.step()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    batches.close()
