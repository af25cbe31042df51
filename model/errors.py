"""The one kind of error that a user can act on."""


class K2Error(Exception):
    """A problem the user can fix; `hint` says how. Anything else is a bug and keeps its traceback."""

    def __init__(self, message: str, *, hint: str = ""):
        super().__init__(message)
        self.hint = hint
