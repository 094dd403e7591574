"""Turn images into .beton files: sources, decoding, writing, the demo set and fastbyol-prep."""
