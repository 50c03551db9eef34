"""What figures show: one module for each kind, with a function that draws it of compiled tables."""
