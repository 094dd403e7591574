"""What a run reports while it trains: rows, warnings, progress, traces."""
