"""A queue that a chaos run starts itself, so that it can kill it, freeze it, or cut off the end of its file.

Owns the server and the proxy in front of it. When a host crashes, writes that have not reached the disk are lost. To a
reader it is the same if the server is killed and bytes are cut off its newest append-only file.
"""

import signal
from pathlib import Path

from benchmarks.chaos.proxy import CuttableProxy
from penstock.broker.embedded import EmbeddedServer


class OwnQueue:
    """A server, and the proxy that services connect to."""

    def __init__(self, folder: Path) -> None:
        self.server = EmbeddedServer(folder, log_path=folder.with_name("queue.log"))
        self.server.start()
        self.proxy = CuttableProxy(self.server.port)
        self.proxy.start()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with the queue's address, for the services."""
        url = f"redis://127.0.0.1:{self.proxy.port}/0"
        return {"PENSTOCK_REDIS__URL": url, "PENSTOCK_REDIS__PASSWORD": self.server.password}

    @property
    def pid(self) -> int:
        assert self.server.process is not None
        return self.server.process.pid

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        self.server.spawn()
        self.server.wait_ready()

    def freeze(self) -> None:
        assert self.server.process is not None
        self.server.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.server.process is not None
        self.server.process.send_signal(signal.SIGCONT)

    def lose_tail(self, num_bytes: int) -> int:
        """Cut the end off the newest append-only file, while the server is dead; returns the bytes cut off."""
        files = sorted((self.server.folder / "appendonlydir").glob("*.incr.aof"), key=_sequence)
        size = files[-1].stat().st_size
        kept = max(0, size - num_bytes)
        with files[-1].open("r+b") as file:
            file.truncate(kept)
        return size - kept

    def stop(self) -> None:
        self.thaw()
        self.proxy.stop()
        self.server.stop()


def _sequence(path: Path) -> int:
    """The <sequence> of appendonly.aof.<sequence>.incr.aof."""
    return int(path.name.split(".")[2])
