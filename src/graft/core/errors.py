"""The one error that users are meant to read."""


class GraftError(ValueError):
    """What was asked cannot be done: the message names the thing, its value and what would work.

    The command line prints it as one sentence and exits with 2; anything else is a bug and keeps its traceback.
    """
