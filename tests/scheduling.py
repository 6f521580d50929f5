"""Which tests pytest-xdist gives to one worker as a whole: those of a module, and all that share the pair of engines.

So fixtures of a module, and the engines of `sglang_pair`, are made once, however many workers there are.
"""

from xdist.scheduler import LoadFileScheduling

ENGINES = "_sglang.py"


class ModuleScheduling(LoadFileScheduling):  # type: ignore[misc]  # it comes without types
    """In the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        module: str = super()._split_scope(nodeid)
        return ENGINES if module.endswith(ENGINES) else module
