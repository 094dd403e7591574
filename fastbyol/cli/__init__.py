"""The command lines of fastbyol-train and fastbyol-eval."""
