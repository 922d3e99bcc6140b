"""The two ways a command can end badly, each with the sentence that a person reads.

Both carry exactly one sentence: what is wrong, where, and what is allowed or what happens next.
"""


class UserError(Exception):
    """The command cannot be right: a wrong name, value, path or combination. Exit code 2."""


class StageError(Exception):
    """A stage started and could not end well: NaN, collapse, a full disk. Exit code 1."""


def one_line(problem: BaseException, length: int = 160) -> str:
    """What an exception of others says, as part of a sentence."""
    return " ".join(str(problem).split())[:length] or type(problem).__name__
