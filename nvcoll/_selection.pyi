from typing import Any

HARDWARE: tuple[str, ...]
LAUNCH: str
BLOCK_SIZES: tuple[int, ...]

def matches(rule: dict[str, Any], verb: str, nbytes: int, ranks: int, nodes: int, oversubscribed: bool) -> bool: ...
def choose(
    rules: list[dict[str, Any]],
    verb: str,
    nbytes: int,
    ranks: int,
    nodes: int,
    oversubscribed: bool,
    reasons: dict[str, str | None],
    costs: dict[str, float],
) -> tuple[str, str]: ...
def check_rules(rules: Any, names: Any, verbs: tuple[str, ...]) -> None: ...
def shape_launch(rules: list[dict[str, Any]], nbytes: int, far: bool) -> tuple[int, int | None, bool]: ...
def check_launch(rules: Any) -> None: ...
