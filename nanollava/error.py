"""The one exception that says what a user did wrong."""


class Error(Exception):
    """Bad input, in one line: the file, the field and the remedy. The command lines print it and exit with status 2."""


def first_line(error: Exception) -> str:
    """What another library's exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
