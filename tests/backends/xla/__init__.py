"""What runs in a process of its own, with torch_xla on the CPU, and prints one JSON object."""
