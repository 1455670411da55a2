"""Make a rank end with its launcher: the kernel kills it when its parent dies, for whatever reason.

Linux only (prctl). Elsewhere the ranks of a killed launcher end with the timeout of their next collective.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(launcher_pid: int | None) -> None:
    """Kill this process when its parent dies. A rank calls it first; `launcher_pid` is our own launcher's, to notice if
    it died before this call."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if launcher_pid is not None and os.getppid() != launcher_pid:
        os._exit(1)
