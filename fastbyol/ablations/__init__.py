"""The paper's ablation tables: running their cells and writing our scores beside the paper's."""
