"""What worker processes do in tests: a module that is quick to import."""

import os


def echo(job):
    """The job and who worked on it; prints, which must not get among the answers."""
    print("noise", job)
    return job, os.getpid()
