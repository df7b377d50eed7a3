"""What ends a launch: one line that says what was wrong and what to change."""


class LaunchError(Exception):
    """The server cannot start or cannot go on. The message is all that the user sees."""
