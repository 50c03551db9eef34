"""Where trials run: everything that touches Ray."""
