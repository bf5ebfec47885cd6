"""How commands fail: exit codes, and the error that ends a command with one line."""

from __future__ import annotations

EXIT_MISMATCH = 1
EXIT_ERROR = 2
EXIT_NO_GPU = 3
EXIT_INTERRUPTED = 130  # what a shell reports after SIGINT, and below after SIGPIPE
EXIT_BROKEN_PIPE = 141

# The text about them in the help of the commands.
EXIT_CODES = "exit codes: 0 success, 2 bad usage or bad input"
EXIT_CODES_WITH_GPU = f"{EXIT_CODES}, 3 no GPU where one is needed"


class CommandError(Exception):
    """Ends a command with one line on stderr and an exit code."""

    def __init__(self, message: str, code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.code = code
