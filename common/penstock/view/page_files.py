"""The files of the page, and the plotting library from its package, which is not imported.

Invariant: only files of this package and that script are served, by a name that leads nowhere else.
"""

import importlib.resources
from importlib.util import find_spec
from pathlib import Path

from fastapi.responses import FileResponse

from penstock.errors import ConfigError

PLOTTING = "plotly.min.js"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def page_file(name: str) -> FileResponse:
    """A file of the page; ConfigError if there is none of this name."""
    if name == PLOTTING:
        path = _plotting_library()
    else:
        path = Path(str(importlib.resources.files("penstock.view") / "static")) / Path(name).name
    if path is None or path.suffix not in KINDS or not path.is_file():
        raise ConfigError(f"saw the file {name[:80]!r}, which the page does not have")
    return FileResponse(path, media_type=KINDS[path.suffix], headers={"Cache-Control": "no-cache"})


def _plotting_library() -> Path | None:
    """The script in the package plotly, which is not imported; None if it is not installed."""
    found = find_spec("plotly")
    folders = found.submodule_search_locations if found else None
    return Path(next(iter(folders))) / "package_data" / PLOTTING if folders else None
