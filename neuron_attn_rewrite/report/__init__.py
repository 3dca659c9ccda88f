"""The report: what was found, proven, chosen and replaced, and why."""
