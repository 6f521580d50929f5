"""Has an engine on this host read the next weights while it generates (`inside.ahead`, which runs in it).

Invariant: this only saves time; whatever fails here, the update that follows reads for itself.
"""

import asyncio
import logging
import os

log = logging.getLogger(__name__)


def ahead_address(port: int) -> str:
    """The abstract socket at which an engine whose server has this port listens: no file, so that nothing stays."""
    return f"penstock-read-ahead-{port}"


async def read_ahead(port: int, folder: str, timeout_seconds: float) -> None:
    """Return when the engine has read the folder, cannot, or is late."""
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_unix_connection(f"\0{ahead_address(port)}")
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
