"""What a run does in each step and around it: tasks, optimizer, log, best parameters."""
