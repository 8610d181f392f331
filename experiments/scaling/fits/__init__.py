"""The table of a study, fits to it with intervals, comparisons of models, and the study's page."""
