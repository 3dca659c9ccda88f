"""What masks say, and the proof of it."""
