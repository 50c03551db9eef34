"""What a sweep runs: a table file becomes trials, these share stages, and all of it has a price."""
