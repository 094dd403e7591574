"""Images as vectors: files of them, near copies, groups, and a map to look at."""
