"""Exceptions for what a user, another machine, or time can mend."""


class UserError(Exception):
    """Bad input or an unusable environment; the text says what is wrong, where, and what to do.

    The command lines print the text without a traceback and exit with status 2.
    """


class MachineError(UserError):
    """This machine cannot do it, another may: it lacks data, memory or room."""


class StoreError(UserError):
    """The store is away, full or not writable; the same may succeed later."""


def first_line(error: BaseException) -> str:
    """Of its message; the name of its class where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
