"""Errors whose message is meant for the person who started the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps


class UserError(ValueError):
    """Something the user can mend: says the rule, the value got, and the remedy, in one line.

    `titan_fp8.train` prints it without a traceback and exits with `status`.
    """

    status = 2


class NotFinite(UserError):
    """Loss or gradients are not finite, in more steps in a row than allowed: the run has come to its end."""

    status = 3


def in_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """For a tool's `main`, which returns the exit status: a UserError is one line on stderr, and its status."""

    @wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.status

    return run
