"""What a user of the command line is told."""


class UsageError(ValueError):
    """What was asked for makes no sense; the message names argument, value and remedy."""
