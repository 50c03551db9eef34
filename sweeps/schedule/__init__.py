"""In which order trials start, what holds one back, and what becomes of one that failed."""
