"""Mutants that no test can notice, each with the reason."""

STORED = "masks/stored.py"
LOOP = "for inside, outside in ((first, others[0]), (others[0], first)) if bool((others == others[0]).all()) else ():"

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (STORED, old, new): why
    for why, pairs in {
        "the list has one element": (
            (
                "return (Case(frozenset(), at[wide[0]] * step + int(line[0])),)",
                "return (Case(frozenset(), at[wide[ -1]] * step + int(line[0])),)",
            ),
            (
                "if len(claims) == 1 and isinstance(claims[0], Band):",
                "if len(claims) == 1 and isinstance(claims[ -1], Band):",
            ),
            ("within = _within(claims[0], i, j)", "within = _within(claims[ -1], i, j)"),
        ),
        "any element will do as the first of the two values": tuple(
            ("first = held[0, 0]", f"first = held[{place}]") for place in (" 1, 0", " -1, 0", "0, 1", "0, -1")
        ),
        "all of the others are equal": (
            (LOOP, LOOP.replace("first, others[0]", "first, others[ -1]")),
            (LOOP, LOOP.replace("(others[0], first)", "(others[ -1], first)")),
            (LOOP, LOOP.replace("== others[0]", "== others[ -1]")),
        ),
    }.items()
    for old, new in pairs
}
"""By module, the line as it is, and the line as the mutant has it."""
