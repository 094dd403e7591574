"""fastbyol: BYOL encoders from a folder of images and a deadline."""

import os

# Threads that wait by sleeping, not spinning: beside other busy processes a CPU step is up to ten times faster
# (docs/log.md). Read when torch loads its thread pool, so it has to be said before that; a user's own choice stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
