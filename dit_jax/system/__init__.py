"""The operating system: files that are whole or not there, locks, signals, the terminal."""
