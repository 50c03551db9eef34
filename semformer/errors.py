"""The one exception for what a user can mend."""


class UserError(Exception):
    """Bad input or an unusable environment; the text says what is wrong, where, and what to do.

    The command lines print the text without a traceback and exit with status 2.
    """
