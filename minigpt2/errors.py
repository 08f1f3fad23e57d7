"""What goes wrong through no fault of ours: one line that says what, where, and what to do.

The scripts print these as `error: ...` and exit with code 2; any other exception is a bug and exits
with 1.
"""


class InputError(ValueError):
    """Something the user gave (a flag, a file, a folder, a model name) cannot be used as it is."""


class NotFoundError(InputError, FileNotFoundError):
    """A file, a folder, a model or a revision that was named does not exist."""


class OptionError(InputError):
    """An option has a value that is not allowed.

    The text calls options by the names that they have in Python; those of `names` are flags where
    they came from a command line, and `options.in_flags` writes them so.
    """

    def __init__(self, text: str, *names: str) -> None:
        super().__init__(text)
        self.names = names
