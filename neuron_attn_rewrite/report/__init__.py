"""What was found, proven, chosen and replaced, and why."""
