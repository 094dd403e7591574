"""What is trained: encoders, batch norm, heads and target, and the losses."""
