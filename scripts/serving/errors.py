"""What the launcher tells a person."""


class ServeError(RuntimeError):
    """A problem in one line that says what to do about it."""
