"""Questions, one folder each, and `experiments.scaling`, the tool that studies of scaling share."""
