"""Command-line arguments and configs: parsed strictly, with every number checked for its range."""
