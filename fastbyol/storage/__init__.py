"""The files of a run: folder, checkpoints, scores."""
