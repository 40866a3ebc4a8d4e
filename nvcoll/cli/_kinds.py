"""Options whose values are like those of settings."""

import argparse
from collections.abc import Callable
from typing import Any

from nvcoll import settings


def of_kind(kind: str) -> Callable[[str], Any]:
    """Return a parser of arguments that accepts what a variable of that kind does."""
    accepted, parse = settings.KINDS[kind]

    def check(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {accepted}, got {text!r}") from None

    return check
