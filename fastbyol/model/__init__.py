"""What is trained: encoders, batch norm, heads and target, the losses, and what one of your own must do."""
