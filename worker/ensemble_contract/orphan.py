"""A process that must not outlive the one that started it: asked of the Linux kernel, prctl(2) PR_SET_PDEATHSIG.

The child asks for itself once it runs. A `preexec_fn` in the parent could not: it runs between fork and exec, where
another thread may hold any lock.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel send `signal_number` to this process when its parent ends, in whatever way.

    Call it first thing, in the main thread. The kernel watches the parent's *thread* that started this process, and
    a child of this process does not inherit the wish. A parent that is gone already ends this process here, with exit
    code 1. A `parent_pid` of 0 means that nobody asked: nothing happens. `SIGKILL` is the default because a drain has
    nobody left to drain for, and a process stuck in a driver answers nothing else.

    Raises OSError if the kernel refuses.
    """
    if parent_pid == 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    # Asked after the wish stands: a parent that ended before it can never trigger it.
    if os.getppid() != parent_pid:
        raise SystemExit(1)
