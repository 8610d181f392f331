"""The figures of a study's table."""
