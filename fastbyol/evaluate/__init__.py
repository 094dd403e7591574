"""Evaluation protocols for a trained encoder: kNN, linear, semi-supervised, transfer, fine-tuning, segmentation."""
