"""Operating system access: atomic files, locks, signals, the terminal."""
