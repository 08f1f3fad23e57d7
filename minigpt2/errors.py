"""What goes wrong through no fault of ours: one line that says what, where, and what to do.

The scripts print these as `error: ...` and exit with code 2; any other exception is a bug and exits
with 1.
"""


def visible(text: str, keep: str = "") -> str:
    r"""Text in which what is not seen as it is (control characters, line ends, marks that turn the
    direction of reading, lone surrogates) is written as Python writes it: \x1b. `keep` stays.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


class InputError(ValueError):
    """Something the user gave (a flag, a file, a folder, a model name) cannot be used as it is.

    What files, and libraries about them, bring into the text is `visible`: whoever catches it may
    print it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(visible(text))


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
