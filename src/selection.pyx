# cython: language_level=3
"""Which algorithm serves a call: a pure function of values that are equal on all ranks.

A local difference here is a deadlock, so nothing is read from the environment, the clock or the machine.
"""

BLOCK_SIZES = (32, 64, 128, 256, 512)
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


def _check_keys(where, rule, needed, known):
    if not isinstance(rule, dict) or not set(needed) <= set(rule):
        raise ValueError(f"{where}: needs {' and '.join(needed)}")
    if set(rule) - known:
        raise ValueError(f"{where}: {sorted(set(rule) - known)} not known; known are {sorted(known)}")


def check_launch(rules):
    """Raise ValueError, naming the rule, unless `rules` shape every launch."""
    known = {"threads", "blocks", "deep", "upto", "far", "note"}
    if not isinstance(rules, list):
        raise ValueError("launch: expected a list of rules")
    for number, rule in enumerate(rules):
        where = f"launch, rule {number + 1}"
        _check_keys(where, rule, ("threads",), known)
        if rule["threads"] not in BLOCK_SIZES:
            raise ValueError(f"{where}: threads is {rule['threads']!r}, expected one of {BLOCK_SIZES}")
        if not all(type(rule.get(key, 1)) is int and rule.get(key, 1) > 0 for key in ("upto", "blocks")):
            raise ValueError(f"{where}: upto is a number of bytes, blocks a number, above 0")
        if not all(isinstance(rule.get(key, True), bool) for key in ("deep", "far")):
            raise ValueError(f"{where}: deep and far are true or false")
    for far in (False, True):
        if not any("upto" not in rule and rule.get("far", far) == far for rule in rules):
            raise ValueError(f"launch: needs a rule without upto, for far {str(far).lower()}")


def check_rules(rules, names, verbs=("allreduce",)):
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
    known = {"verb", "use", "upto", "ranks", "nodes", "oversubscribed", "note"}
    for kind, listed in rules.items():
        if kind == "launch":
            check_launch(listed)
            continue
        if not isinstance(listed, list):
            raise ValueError(f"{kind}: expected a list of rules")
        for number, rule in enumerate(listed):
            where = f"{kind}, rule {number + 1}"
            _check_keys(where, rule, ("verb", "use"), known)
            if rule["verb"] not in verbs:
                raise ValueError(f"{where}: verb is {rule['verb']!r}, expected one of {', '.join(verbs)}")
            if rule["use"] not in names:
                raise ValueError(f"{where}: use is {rule['use']!r}, expected one of {', '.join(sorted(names))}")
            if not isinstance(rule.get("upto", 0), int) or not isinstance(rule.get("oversubscribed", True), bool):
                raise ValueError(f"{where}: upto is a number of bytes, oversubscribed is true or false")
            for key in ("ranks", "nodes"):
                limits = rule.get(key, [None, None])
                numbers = isinstance(limits, list) and all(x is None or isinstance(x, int) for x in limits)
                if not numbers or len(limits) != 2:
                    raise ValueError(f"{where}: {key} is [lowest, highest]")
