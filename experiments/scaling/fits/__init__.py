"""A study's table and what it says: laws with their intervals, contrasts, its page."""
