"""Conversion of images to .beton files: sources, decoding, writing, the demo set and the command fastbyol-prep."""
