"""A stand-in for a Python: notes what pip is asked for, and makes environments of copies of itself."""

from pathlib import Path

SCRIPT = """#!/bin/sh
here={folder}
case "$*" in
"-c import platform"*) printf '%s|linux|x86_64|glibc|2.36' {version} ;;
"-m venv --clear "*) echo venv >> $here/calls; rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"
  echo "version = {version}" > "$4/pyvenv.cfg" ;;
"-m pip --disable-pip-version-check "*) shift 3; echo "$*" >> $here/calls
  while [ -e $here/slow ]; do sleep 0.05; done; [ ! -e $here/broken ] ;;
*) echo "not known: $*" >&2; exit 2 ;;
esac
"""


class StandIn:
    """An interpreter in `folder`; `broken` there makes pip fail, while `slow` is there, pip does not end."""

    def __init__(self, folder: Path, version: str = "3.11.7") -> None:
        self.folder = folder
        self.python = folder / f"python-{version}"
        self.python.write_text(SCRIPT.format(folder=folder, version=version))
        self.python.chmod(0o755)

    def calls(self) -> list[str]:
        """What was asked since the last call; files of locks by their name."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [" ".join(Path(word).name for word in line.split()) for line in lines]
