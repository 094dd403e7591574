"""Sources that lie elsewhere, wherever fsspec reads: their listing, and the copy that is converted."""
