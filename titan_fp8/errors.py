"""Errors whose message is meant for the person who started the run."""


class UserError(ValueError):
    """Something the user can mend: says the rule, the value got, and the remedy, in one line.

    `titan_fp8.train` prints it without a traceback and exits with `status`.
    """

    status = 2


class NotFinite(UserError):
    """Loss or gradients are not finite, in more steps in a row than allowed: the run has come to its end."""

    status = 3
