"""What attention looks like in a graph."""
