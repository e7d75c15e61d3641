"""The one error type whose message is meant for the person who started the run."""


class UserError(ValueError):
    """Something the user can mend: says the rule, the value got, and the remedy, in one line.

    `titan_fp8.train` prints it without a traceback and exits with status 2.
    """
