"""A command's words and its config: read strictly, each number held to its range."""
