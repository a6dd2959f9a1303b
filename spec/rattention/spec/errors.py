"""The two ways in which a call can be refused."""


class SpecError(ValueError):
    """A call breaks a constraint of the specification.

    The text is the same from every backend: `operation: argument: expected ..., got ... (CLAUSE)`.
    """

    def __init__(self, operation: str, argument: str, expected: str, got: str, clause: str):
        super().__init__(f"{operation}: {argument}: expected {expected}, got {got} ({clause})")
        self.operation = operation
        self.argument = argument
        self.expected = expected
        self.got = got
        self.clause = clause

    def __reduce__(self):  # the default would call __init__ with the one joined text
        return type(self), (self.operation, self.argument, self.expected, self.got, self.clause)


class Unsupported(Exception):
    """The call is valid, but this backend does not implement it (BCK-3). `reason` says what is lacking."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
