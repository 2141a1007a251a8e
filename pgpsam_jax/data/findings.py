"""Problems of a data set: `Finding` in reports, `BadFile` as an exception."""

from dataclasses import asdict, dataclass

from pgpsam_jax.errors import UserError

ERROR, WARNING = "error", "warning"


class BadFile(UserError):
    """A file that cannot be used; `code` is the kind of problem, one word for reports."""

    def __init__(self, message: str, code: str = "unreadable"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Finding:
    """One problem of a file or data set."""

    level: str  # `ERROR` or `WARNING`
    code: str  # kind of problem, one word
    file: str  # empty for the data set as a whole
    message: str  # a sentence with the remedy

    def to_json(self) -> dict:
        return asdict(self)
