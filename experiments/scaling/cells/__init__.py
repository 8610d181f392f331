"""The runs of a study: the cells of a sweep, their training and evaluation, and their rows."""
