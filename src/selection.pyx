# cython: language_level=3
"""Which algorithm serves a call: a pure function of values that are equal on all ranks.

A local difference here is a deadlock, so nothing is read from the environment, the clock or the machine.
"""

HARDWARE = ("host", "cuda")
"""What rules may be for: the kinds of planners."""
LAUNCH = "launch"
"""Where rules shape launches on GPUs."""
BLOCK_SIZES = (8, 16, 32, 64, 128, 256, 512)
"""Threads that a block on a GPU may have."""


def matches(dict rule, str verb, nbytes, ranks, nodes, oversubscribed):
    """Tell whether a rule speaks of a call.

    Parameters
    ----------
    rule
        Keys ``verb`` and ``use``, and as limits ``upto`` (bytes, inclusive), ``ranks`` and ``nodes`` (lowest and
        highest, inclusive; null is no limit) and ``oversubscribed`` (more ranks than cores).
    verb, nbytes, ranks, nodes, oversubscribed
        The call.
    """
    if rule["verb"] != verb or nbytes > rule.get("upto", nbytes):
        return False
    for key, value in (("ranks", ranks), ("nodes", nodes)):
        low, high = rule.get(key, (None, None))
        if (low is not None and value < low) or (high is not None and value > high):
            return False
    return rule.get("oversubscribed", oversubscribed) == oversubscribed


def choose(list rules, str verb, nbytes, ranks, nodes, oversubscribed, dict reasons, dict costs):
    """Choose an algorithm: by the first rule that matches and is supported, else by the lowest expected cost.

    Parameters
    ----------
    rules
        Rules for this kind of hardware, the first that matches wins.
    verb, nbytes, ranks, nodes, oversubscribed
        The call.
    reasons
        For every candidate ``"algorithm/protocol"`` None, or why it cannot serve.
    costs
        Expected seconds of those that can.

    Returns
    -------
    tuple of str
        The candidate, and why it was chosen.
    """
    passed_over = ""
    for rule in rules:
        if not matches(rule, verb, nbytes, ranks, nodes, oversubscribed):
            continue
        use = rule["use"]
        if use in reasons and reasons[use] is None:
            upto = rule.get("upto")
            limit = f"up to {upto} bytes" if upto is not None else "for any size"
            return use, f"rule: {use} {limit}{passed_over}"
        passed_over += f"; passed over: {use} ({reasons.get(use, 'there is no such algorithm')})"
    if not costs:
        raise ValueError(f"{verb}: no algorithm serves this call: {reasons}")
    use = min(costs, key=lambda name: (costs[name], name))
    return use, f"no rule: lowest expected cost, {costs[use] * 1e6:.1f} us{passed_over}"


def shape_launch(list rules, nbytes, far):
    """Return the threads of a block on a GPU, the most blocks (None: as many as fit), and whether threads work deep.

    Parameters
    ----------
    rules
        The first that matches wins. Keys: ``threads``, and perhaps ``blocks`` and ``deep`` (a thread has up to four
        packs under way at a time); as limits ``upto`` (bytes, inclusive) and ``far`` (some ranks are reached through
        the network).
    nbytes, far
        The call.
    """
    for rule in rules:
        if nbytes <= rule.get("upto", nbytes) and rule.get("far", far) == far:
            return rule["threads"], rule.get("blocks"), rule.get("deep", False)
    raise ValueError(f"launch: no rule for {nbytes} bytes, far {far}")


def _is_number(value, least):
    return type(value) is int and value >= least  # true and false are no numbers here


def _each_rule(where, listed, needed, known):
    """Yield each rule with its place in words, once its keys are right."""
    if not isinstance(listed, list):
        raise ValueError(f"{where}: expected a list of rules")
    for number, rule in enumerate(listed):
        place = f"{where}, rule {number + 1}"
        unknown = sorted(set(rule) - known) if isinstance(rule, dict) else []
        if unknown:
            raise ValueError(f"{place}: key {unknown[0]} is not known; known are {', '.join(sorted(known))}")
        if not isinstance(rule, dict) or not set(needed) <= set(rule):
            raise ValueError(f"{place}: needs {' and '.join(needed)}")
        yield place, rule


def _check_number(where, rule, key, least):
    if not _is_number(rule.get(key, least), least):
        of = " of bytes" if key == "upto" else ""
        raise ValueError(f"{where}: {key} is {rule[key]!r}, expected a whole number{of}, {least} or more")


def _check_truth(where, rule, key):
    if not isinstance(rule.get(key, True), bool):
        raise ValueError(f"{where}: {key} is {rule[key]!r}, expected true or false")


def _check_range(where, key, limits):
    if not isinstance(limits, list) or len(limits) != 2 or not all(x is None or _is_number(x, 1) for x in limits):
        raise ValueError(f"{where}: {key} is [lowest, highest], each a number of 1 or more or null, got {limits!r}")
    low, high = limits
    if None not in limits and low > high:
        raise ValueError(f"{where}: {key} is [lowest, highest], and {low} is above {high}")


def _check_choices(kind, listed, names, verbs):
    known = {"verb", "use", "upto", "ranks", "nodes", "oversubscribed", "note"}
    for where, rule in _each_rule(kind, listed, ("verb", "use"), known):
        if rule["verb"] not in verbs:
            raise ValueError(f"{where}: verb is {rule['verb']!r}, expected one of {', '.join(verbs)}")
        if rule["use"] not in names:
            raise ValueError(f"{where}: use is {rule['use']!r}, expected one of {', '.join(sorted(names))}")
        _check_number(where, rule, "upto", 0)
        _check_truth(where, rule, "oversubscribed")
        for key in ("ranks", "nodes"):
            _check_range(where, key, rule.get(key, [None, None]))


def check_launch(rules):
    """Raise ValueError, naming the rule, unless `rules` shape every launch."""
    known = {"threads", "blocks", "deep", "upto", "far", "note"}
    for where, rule in _each_rule(LAUNCH, rules, ("threads",), known):
        if not _is_number(rule["threads"], 1) or rule["threads"] not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"{where}: threads is {rule['threads']!r}, expected one of {sizes}")
        for key in ("upto", "blocks"):
            _check_number(where, rule, key, 1)
        for key in ("deep", "far"):
            _check_truth(where, rule, key)
    for far in (False, True):
        if not any("upto" not in rule and rule.get("far", far) == far for rule in rules):
            raise ValueError(f"{LAUNCH}: needs a rule without upto, for far {str(far).lower()}")


def check_rules(rules, names, verbs):
    """Raise ValueError, naming the rule, unless `rules` is a mapping of kinds of hardware to lists of rules.

    Under ``launch`` there may be rules for the shape of launches on GPUs.

    Parameters
    ----------
    rules
        What was read from a rules file.
    names
        Candidates that rules may name.
    verbs
        Collectives that rules may speak of.
    """
    if not isinstance(rules, dict):
        raise ValueError("expected an object of lists, one for each kind of hardware")
    for kind, listed in rules.items():
        if kind == LAUNCH:
            check_launch(listed)
        elif kind in HARDWARE:
            _check_choices(kind, listed, names, verbs)
        else:
            raise ValueError(f"{kind}: not known; known are {', '.join((*HARDWARE, LAUNCH))}")
