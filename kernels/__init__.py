"""Name the operations a training step is made of; fastbyol.kernels.reference holds their mathematics."""
