"""How good samples are: features, FID and the other metrics, references, rows and their plots."""
