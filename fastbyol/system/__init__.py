"""The machine a run is on: signals, limits, devices, ranks, threads."""
