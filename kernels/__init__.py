"""The operations of a training step as Triton kernels; fastbyol.kernels.reference defines their results."""
