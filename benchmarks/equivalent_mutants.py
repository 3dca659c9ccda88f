"""Mutants that no test can notice, each with the reason."""

EVERY = (("", ""),)
"""All mutants of a line. Some of them may be noticed."""
GROUPS: dict[str, dict[str, dict[str, tuple[tuple[str, str], ...]]]] = {
    "capture/autocast.py": {
        "a copy has one argument": {'self.found.setdefault(id(args[0]), kwargs["dtype"])': (("[0]", "[ -1]"),)},
        "only one operator runs": {
            "stack.enter_context(torch.autocast(device, to, cache_enabled=False))": (("False", "True"),),
        },
    },
    "masks/addends.py": {
        "any number near it will do": {"LOWERED = -(2.0**100)": (("100", " 101"), ("100", " 99"))},
        "the list has one element": {
            "return len(loose) == 1 and loose[0].rounds_alike": (("[0]", "[ -1]"),),
        },
    },
    "masks/affine.py": {
        "a limit of effort": {
            "MOST_INEQUALITIES = 400": (("400", "399"), ("400", "401")),
            "if not known or len(known) > MOST_INEQUALITIES:": ((">", ">="),),
        },
        "only the order in which variables are eliminated": {
            "return sum(c > 0 for c in signs) * sum(c < 0 for c in signs)": EVERY,
        },
        "with coefficient 0 it adds multiples of what is known": {
            "above = [k for k in known if k.coefficient(of) > 0]": (("> 0", ">= 0"), ("> 0", "> -1")),
            "below = [k for k in known if k.coefficient(of) < 0]": (("< 0", "<= 0"), ("< 0", "< 1")),
        },
        "division by 1": {"if shared <= 1:": (("<= 1", "< 1"), ("<= 1", "<= 0"))},
    },
    "masks/bounds.py": {
        "a coefficient is not 0": {
            "return of.of + rest if slope > 0 else rest - of.of + (of.by - 1)": (("> 0", ">= 0"), ("> 0", "> -1")),
            "return KeyBound(slope > 0, inequality.without(key_index) * -slope)": (("> 0", ">= 0"), ("> 0", "> -1")),
            "number = inequality.without(element) * -slope + (slope < 0)": (("< 0", "<= 0"), ("< 0", "< 1")),
            "end = variable(Below(element.node, tuple(row), number)) - (place - key) - (slope < 0)": (
                ("< 0", "<= 0"),
                ("< 0", "< 1"),
            ),
            "return KeyBound(slope > 0, end)": (("> 0", ">= 0"), ("> 0", "> -1")),
            "return of.node, start.constant, slope < 0": (("< 0", "<= 0"), ("< 0", "< 1")),
            "parts = [f\"{'-' if c < 0 else '+'} {'' if abs(c) == 1 else f'{abs(c)} * '}{name(v)}\" "
            "for v, c in _ordered(end)]": (("c < 0", "c <= 0"), ("c < 0", "c < 1")),
            "return sorted(end.terms, key=lambda term: (isinstance(term[0], Index), term[1] < 0, str(term[0])))": (
                ("< 0", "<= 0"),
                ("< 0", "< 1"),
            ),
        },
    },
    "masks/cases.py": {
        "a limit of effort": {"MOST_CASES = 64": (("64", "65"),)},
        "any number that is no axis will do": {
            "_fresh: Iterator[int] = field(default_factory=lambda: itertools.count(4))": (("(4)", "( 5)"),),
        },
        "an expression without a symbol is its number": {
            "return self._expression(expression_of(value)) if value > LARGEST else Affine(value)": ((">", ">="),),
        },
    },
    "masks/conditions.py": {
        "with several of them it is neither": {
            "padding = key_padding(inequality, truths[0], key, evaluator)": (("[0]", "[ -1]"),),
            "if len(end.terms) == 1 and queries and queries[0][1] == 1:": (("queries[0]", "queries[ -1]"),),
        },
        "both are of one row": {
            "if not never_decreases(pair[0].node, pair[0].index[:-1], evaluator):": (
                ("(pair[0]", "(pair[ 1]"),
                ("(pair[0]", "(pair[ -1]"),
                (", pair[0]", ", pair[ 1]"),
                (", pair[0]", ", pair[ -1]"),
            ),
        },
        "without an index of the key there is no bound": {
            "if key is None or query is None:": (("or", "and"),),
            "return False  # there is no bound either": (("False", "True"),),
        },
        "only which one of several conditions is kept": {
            "for inequality in sorted(shared, key=lambda g: -len(g.terms)):": (("-len", "len"),),
        },
    },
    "masks/elementwise.py": {
        "a limit of effort": {"if len(out) + len(stack) > MOST_CASES:": EVERY},
        "it only drops cases that are impossible": {
            "if not guard or not case.guard or not e.impossible(both):": EVERY,
        },
    },
    "masks/empty_rows.py": {
        "any number near it will do": {"ABSORBS = 1e6": (("1e6", "1000001.0"), ("1e6", "999999.0"))},
    },
    "masks/fit.py": {
        "the chunks of one key are a band of one key, which is tried first": {
            "begins = i[seen & (first == i) & (i > 0)]": (("i > 0", "i > 1"),),
        },
    },
    "masks/growing.py": {
        "both are of one row": {
            "others = (*pair[0].index[:-1], pair[0].index[-1] - place)": (
                ("*pair[0]", "*pair[ 1]"),
                ("*pair[0]", "*pair[ -1]"),
                (", pair[0]", ", pair[ 1]"),
                (", pair[0]", ", pair[ -1]"),
            ),
        },
        "any number less than the axis of the query will do": {
            "return max((of.axis for of in number.index[-1].variables() if isinstance(of, Index)), default=-1)": tuple(
                ("default=-1", f"default={number}") for number in ("1", "- 0", "- 2")
            ),
        },
    },
    "masks/movement.py": {
        "these operators have no other argument, or dim": {
            "return e.cases(node.args[0], at)": (("[0]", "[ -1]"),),
            "source, indices = node.args[:2]": ((":2", ": 3"),),
            "return (Case(frozenset(), in_range(e, node, start + at[0] * step.constant)),)": (("at[0]", "at[ -1]"),),
        },
        "it only drops cases that are impossible": {
            "out += [Case(guard | c.guard, c.value) for c in cases if not e.impossible(guard | c.guard)]": (
                ("impossible(guard |", "impossible(guard &"),
            ),
        },
    },
    "masks/read.py": {
        "a limit of memory": {
            "BLOCK = 2**20": (("2**", "3**"), ("2**", "1**"), ("**20", "** 21"), ("**20", "** 19")),
        },
        "the axis of no other dim": {"PART = -1": (("-1", "- 2"),)},
        "all of them are equal": {
            "intervals = row_intervals(either[0, 0])": (("[0,", "[ -1,"), (", 0]", ", -1]")),
        },
        "the list has one element": {
            "region = None if length == q_len else Region(along[0], start, length)": (("[0]", "[ -1]"),),
        },
        "only whether a copy is made": {
            "uniform = next((end for end in ends if bool((visible | (values == end)).all())), None)": (("|", "&"),),
        },
    },
    "masks/stored.py": {
        "the list has one element": {
            "return (Case(frozenset(), at[wide[0]] * step + int(line[0])),)": (("wide[0]", "wide[ -1]"),),
            "if len(claims) == 1 and isinstance(claims[0], Band):": (("claims[0]", "claims[ -1]"),),
            "within = _within(claims[0], i, j)": (("claims[0]", "claims[ -1]"),),
        },
        "any element will do as the first of the two values": {
            "first = held[0, 0]": tuple(("[0, 0]", f"[{at}]") for at in (" 1, 0", " -1, 0", "0, 1", "0, -1")),
        },
        "all of the others are equal": {
            "for inside, outside in ((first, others[0]), (others[0], first)) "
            "if bool(same(others, others[0]).all()) else ():": (
                ("first, others[0]", "first, others[ -1]"),
                ("(others[0], first)", "(others[ -1], first)"),
                ("same(others, others[0])", "same(others, others[ -1])"),
            ),
        },
    },
    "replace/differences.py": {
        "noise has no sign": {
            "return output + torch.randn(output.shape).to(output) * size": (("output +", "output -"),),
        },
        "the other numbers are not negative": {
            "seeing_none = _largest(difference.where(empty, 0))": ((", 0", ", -1"),),
        },
        "only magnitudes of 0 or nothing are left beside it": {
            "size = self.tolerance(graft) * output.abs().nan_to_num(0, 0).max()": (
                ("(0, 0)", "( -1, 0)"),
                ("(0, 0)", "(0, -1)"),
            ),
            "return _largest(old.abs().where(counts & old.isfinite(), 0)).clamp_min(torch.finfo(torch.float32).tiny)": (
                (", 0", ", -1"),
            ),
        },
    },
    "replace/running.py": {
        "any seed will do": {
            "torch.manual_seed(0)": (("(0)", "( 1)"), ("(0)", "( -1)")),
        },
        "it already is the last to read it": {
            "if node not in last or runs.position[last[node]] < runs.position[g.result]:": (("<", "<="),),
        },
    },
    "replace/verify.py": {
        "a limit of effort": {"MOST_ELEMENTS = 2**26": EVERY},
        "the next comparison says the same": {"if together > limit:": ((">", ">="),)},
        "an error is not negative": {"error: float = 0.0": (("0.0", "-1.0"),)},
    },
}
"""By module and reason: a line, and what the mutants have in it instead of what."""

EQUIVALENT = {
    (path, line, line.replace(old, new)): why
    for path, reasons in GROUPS.items()
    for why, lines in reasons.items()
    for line, changes in lines.items()
    for old, new in changes
}
"""The reasons, by module, the line as it is, and the line as the mutant has it; for `EVERY`, the line as it is."""
