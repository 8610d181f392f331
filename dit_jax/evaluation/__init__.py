"""Evaluation of samples: features, FID and other metrics, references, rows, and plots of rows."""
