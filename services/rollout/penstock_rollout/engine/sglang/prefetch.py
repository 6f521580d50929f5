"""Asks an engine on this host to prefetch the next weights while it generates; `inside.prefetch` does it in the engine.

Invariant: this only saves time. If anything fails here, the load that follows reads the files itself.
"""

import asyncio
import logging
import os

log = logging.getLogger(__name__)


def prefetch_address(port: int) -> str:
    """The abstract socket of the engine whose server has this port. It is no file, so nothing is left behind."""
    return f"penstock-prefetch-{port}"


async def prefetch(port: int, folder: str, timeout_seconds: float) -> None:
    """Return when the engine has read the folder, cannot read it, or is late."""
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_unix_connection(f"\0{prefetch_address(port)}")
            try:
                writer.write(os.fsencode(folder))
                writer.write_eof()
                await reader.read()  # until it closes
            finally:
                writer.close()
    except TimeoutError:
        log.warning("the engine did not read %s during generation within %g s", folder, timeout_seconds)
    except OSError as error:  # it does not listen, or has ended
        log.debug("the engine does not read %s during generation: %s", folder, error)
