"""The runs of a study: a config's cells, each trained and evaluated, and their rows."""
