"""What worker processes do in tests: a module that is quick to import."""

import os
import time

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import atomic_path


def echo(job):
    """The job and who worked on it; prints, which must not get among the answers."""
    print("noise", job)
    return job, os.getpid()


def refuse(sentence):
    raise UserError(sentence)


def write_for_long(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        time.sleep(60)
