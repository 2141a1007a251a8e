"""What is wrong with a data set: one finding per fault, and the error of a file that is refused."""

from dataclasses import asdict, dataclass

from pgpsam_jax.errors import UserError

ERROR, WARNING = "error", "warning"


class BadFile(UserError):
    """A file that cannot be used; `code` is the kind of fault, one word for reports."""

    def __init__(self, message: str, code: str = "unreadable"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Finding:
    """`level` is error or warning, `code` one word, `message` a sentence that says what to do.

    `file` is the file it is about; empty where it is about the data set.
    """

    level: str
    code: str
    file: str
    message: str

    def to_json(self) -> dict:
        return asdict(self)
