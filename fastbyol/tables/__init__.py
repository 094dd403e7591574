"""Run the paper's ablation tables cell by cell, and write them beside the paper's numbers."""
