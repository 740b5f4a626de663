"""The one exception for what a person can mend: the command prints its message, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A recipe, a file or an argument is not as it must be. The message says what is wrong, where, and what to do."""
