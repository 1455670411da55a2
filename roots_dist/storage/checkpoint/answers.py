"""Answers of a disk or an object store, with a time limit for one that does not answer.

    question --an answer; or there is no such file--> at once
             --a timeout, EIO, ESTALE, no right to read--> asked again, a few times --> EnvironmentProblem

A place that does not answer says nothing of what is there. Whoever took it for empty or damaged would go a checkpoint
back, or begin at step 0, and set aside what is sound. An object store that answers is wrong only in what it says.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from roots_dist.errors import EnvironmentProblem

log = logging.getLogger(__name__)

T = TypeVar("T")

WAITS_S = (0.5, 1.5, 4.0)
"""Seconds before a question is asked again: a network that is gone for a moment, a server that starts again."""
OF_CONTENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
OF_CONTENT_NUMBERS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
    errno.ENXIO,
    errno.ENAMETOOLONG,
    errno.EFBIG,
)
"""Errors that tell what is under a name: nothing, a folder, a link to itself, a pipe, a file that is no such file."""


def ask(place: object, question: Callable[[], T]) -> T:
    """The answer. Raises an OSError that tells what is there; EnvironmentProblem if the place does not answer, however
    often it is asked. `place`: the file or the URL, for the message."""
    for wait in (*WAITS_S, None):
        try:
            return question()
        except OSError as error:
            if isinstance(error, OF_CONTENT) or error.errno in OF_CONTENT_NUMBERS:
                raise
            if wait is None:
                raise _no_answer(place, error) from error
            log.info("%s does not answer (%s), it is asked again in %g s", place, error, wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _no_answer(place: object, error: OSError) -> EnvironmentProblem:
    refused = isinstance(error, PermissionError) or error.errno in (errno.EACCES, errno.EPERM)
    if "://" in str(place):
        fix = (
            "give the key the right to list, read and write there (a store may also refuse what is not there to one "
            "who may not list)"
            if refused
            else "see to the network, the endpoint and the keys"
        )
    else:
        fix = "see to its owner and permissions" if refused else "see to the disk, or the mount that it is on"
    return EnvironmentProblem(
        f"{place} = no answer ({error}), asked {len(WAITS_S) + 1} times: expected it to be read, or not to be there. "
        f"Fix: {fix}, and repeat the command: nothing was changed because of it."
    )
