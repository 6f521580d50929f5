"""`without_flock.py ERRNO COMMAND ...`: become COMMAND on a machine whose kernel answers flock with that error.

As a network file system without locks does. The filter stays over exec and is inherited by children.
"""

import ctypes
import os
import platform
import sys

UNSUPPORTED_EXIT_CODE = 99
FLOCK = {"x86_64": 73, "aarch64": 32}  # the numbers of the system call
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
RETURN_ERRNO, RETURN_ALLOW = 0x00050000, 0x7FFF0000


class Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction)))


def refuse_flock(error_number: int) -> None:
    """Let every flock of this process fail from now on. OSError if the kernel has no such filters."""
    if platform.machine() not in FLOCK:
        raise OSError(f"the number of flock is not known for {platform.machine()}")
    instructions = (Instruction * 4)(
        Instruction(LOAD_WORD, 0, 0, 0),
        Instruction(JUMP_IF_EQUAL, 0, 1, FLOCK[platform.machine()]),
        Instruction(RETURN, 0, 0, RETURN_ERRNO | error_number),
        Instruction(RETURN, 0, 0, RETURN_ALLOW),
    )
    program = Program(len(instructions), instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    allowed = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    if not allowed or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel filters no system calls here")


def main() -> None:
    """Entry point."""
    try:
        refuse_flock(int(sys.argv[1]))
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(UNSUPPORTED_EXIT_CODE)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
