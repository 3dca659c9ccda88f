"""Reading an ATen graph."""
