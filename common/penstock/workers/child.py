"""The inside of a worker process: the pipe to its service.

Invariants: the process dies with its parent (the kernel's signal on Linux, the end of the pipe everywhere); standard
output carries no protocol, so that the user's code may print. The parent measures all deadlines, and kills.

The main thread runs the user's code, because libraries that use signals need it. A second thread reads the pipe, so
that it detects the parent's end during a call as well.
"""

import faulthandler
import os
import socket
import sys
import threading
from queue import SimpleQueue

from penstock.runtime.lifeline import die_with_parent
from penstock.runtime.output import complain
from penstock.workers.frames import LENGTH, Message, frame, frame_length


class ServicePipe:
    """The pipe to the service: messages in their order, and answers."""

    def __init__(self, pipe: socket.socket) -> None:
        self._pipe = pipe
        self._requests: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=self._read_frames, daemon=True).start()

    def receive(self) -> bytes:
        """The next message, encoded. Blocks; the process ends if the pipe does."""
        return self._requests.get()

    def send(self, message: Message) -> None:
        self._pipe.sendall(frame(message))

    def _read_frames(self) -> None:
        """Queue the messages; end the process with the pipe, even during a call."""
        try:
            with self._pipe.makefile("rb") as stream:
                while header := stream.read(LENGTH.size):
                    self._requests.put(stream.read(frame_length(header)))
        except (OSError, ValueError) as error:
            complain(f"worker process: {error}")
        os._exit(0)


def open_pipe() -> ServicePipe:
    """The pipe of a process that `penstock.workers.process` started: `MODULE SOCKET_FD PARENT_PID`."""
    number, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    faulthandler.enable()
    os.set_inheritable(number, False)
    return ServicePipe(socket.socket(fileno=number))
