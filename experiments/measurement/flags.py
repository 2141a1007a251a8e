"""Flags that take a comma-separated list, for both commands."""

from pgpsam_jax.errors import UserError


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise UserError(
            f"{flag} {text!r} is not a list of numbers; write for example 1,2,4"
        ) from None
