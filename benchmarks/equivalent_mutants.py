"""Mutants that no test can notice, each with the reason."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
"""By module, the line as it is, and the line as the mutant has it."""
