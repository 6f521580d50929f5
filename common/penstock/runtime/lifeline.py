"""Ties a process to its parent: if the parent dies for any reason, the kernel ends the process too.

Invariant: there is no gap. The tie is made first, then the parent's id is compared, which detects a parent that died in
between. Imports only the standard library, since it also runs as a script that becomes a command
(`penstock.runtime.process.tied_command`): the command keeps the script's process id and its tie.

Linux only (PR_SET_PDEATHSIG); elsewhere a child is not tied, and the launcher ends leftovers at the next start.
The kernel watches the parent's *thread*: start tied children from a thread that lives as long as its process.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """End the calling process by `signal_number` when its parent `parent_pid` dies, or now if it is already dead."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal_number)


def main() -> None:
    """`lifeline.py PARENT_PID SIGNAL COMMAND...`: tie this process, then become COMMAND."""
    parent_pid, signal_number, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    die_with_parent(parent_pid, signal_number)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(127)  # a shell's exit code for a missing command


if __name__ == "__main__":
    main()
