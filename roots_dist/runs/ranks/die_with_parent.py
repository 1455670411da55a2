"""A rank does not outlive its launcher: the kernel kills it when its parent dies, however that came about.

Linux only (prctl); elsewhere a killed launcher leaves ranks that end with their next collective's timeout.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(launcher_pid: int | None) -> None:
    """Called first thing by a rank. `launcher_pid`: our own launcher, to notice that it died before this call."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if launcher_pid is not None and os.getppid() != launcher_pid:
        os._exit(1)
