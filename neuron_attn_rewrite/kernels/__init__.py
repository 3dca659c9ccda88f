"""What a kernel is: its formula, its implementations, and the operands that it takes."""
