"""Runs one Triton server and leaves nothing of it behind, however it, or the program that launched it, ends.

    guardian.py PREFIX SCRATCH COMMAND...

It is a process of its own because a launcher killed outright cannot clean up. Its standard input is the leash: the end
of it (also when the launcher dies) means stop gracefully, the word "kill" means stop now. When the server has ended,
it kills and reaps every process left in the server's group, removes the shared memory whose name begins with PREFIX
and the folder SCRATCH, and exits with the server's status. Standard library only, so that it starts at once.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

GRACE_S = 15.0  # longer than Triton's own --exit-timeout-secs
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def kill_group(group: int) -> None:
    """Kill every process of the group, if there are any."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def remove_leavings(prefix: str, scratch: Path) -> None:
    """Remove what a server that has ended left in /dev/shm and on disk."""
    for region in Path("/dev/shm").glob(prefix + "*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


def guard(prefix: str, scratch: Path, command: list[str]) -> int:
    """Run `command` until it ends or the leash says so; return its exit status."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # backend processes that outlive the server become ours to reap
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, not inherited by the server
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    ended = os.pidfd_open(server.pid)
    leash = sys.stdin.fileno()
    readable, _, _ = select.select([leash, ended], [], [])
    if leash in readable and os.read(leash, 4) != b"kill":
        server.terminate()
        select.select([ended], [], [], GRACE_S)
    kill_group(server.pid)
    status = server.wait()
    with suppress(ChildProcessError):
        while True:
            os.wait()
    remove_leavings(prefix, scratch)
    return status


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]) & 0xFF)
