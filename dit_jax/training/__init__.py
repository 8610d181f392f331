"""Training: tasks, the optimizer, the step, the log, and the parameters of the best step."""
