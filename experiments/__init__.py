"""Experiments, one folder per question, and `scaling`, the tool that scaling studies share."""
