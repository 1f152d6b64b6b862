"""Errors as text."""


def one_line(error: BaseException) -> str:
    """Return an error's class and its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
