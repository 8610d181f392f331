"""Figures drawn from a study's table."""
