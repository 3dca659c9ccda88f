"""What the caller can ask for."""
