"""Fills SGLang's prefix cache ahead of the groups that need it, for several groups at once.

SGLang computes each prompt of a batch for itself, even G equal ones, and a push empties its cache. So prompts that are
asked for at about the same time form a wave: what all of them begin with is computed once, then each distinct prompt
once, in one request without new tokens. The groups need not wait for its answer: SGLang serves in order, and what
arrives while it computes the prompts finds them in the cache and shares the next forward pass. An engine that computes
the equal prompts of a batch once (`inside.prefill`) is sent only the common beginning. Invariant: this changes what is
computed, never what is sampled; a wave that fails lets its groups go on, which then meet the error themselves.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

Prompt = tuple[int, ...]
Fill = Callable[[Sequence[Prompt]], Awaitable[None]]

QUIET_SECONDS = 0.008  # a wave ends when no prompt has joined for so long; taking a ticket needs about 2 ms
LONGEST_WAVE_SECONDS = 0.05
LEAD_SECONDS = 0.02  # by which the prompts go ahead of their groups: enough to be taken up before them
MIN_SAVED_TOKENS = 64  # fewer are not worth a forward pass of their own


class PrefixWaves:
    """Coalesces the prompts of groups that start together."""

    def __init__(self, fill: Fill) -> None:
        """`fill` puts prompts into the engine's cache."""
        self.computes_equal_once = False  # whether the engine computes the equal prompts of a batch once
        self._fill = fill
        self._wave: list[Prompt] = []
        self._filled: asyncio.Future[None] | None = None
        self._common: Prompt = ()
        self._filling: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Give up what is being filled."""
        for task in self._filling:
            task.cancel()
        await asyncio.gather(*self._filling, return_exceptions=True)

    def forget(self) -> None:
        """The engine's cache has been emptied."""
        self._common = ()

    def computed(self, tokens: Prompt) -> None:
        """The engine has computed these for another reason, and has them in its cache."""
        self._common = tokens

    async def fill(self, prompt: Prompt) -> None:
        """Return when the prompt is in the cache or ahead of whatever is sent next, or its wave has failed."""
        self._wave.append(prompt)
        if self._filled is not None:
            await asyncio.shield(self._filled)
            return
        filled = self._filled = asyncio.get_running_loop().create_future()
        try:
            await self._collect()
            wave, self._wave, self._filled = list(dict.fromkeys(self._wave)), [], None
            common = self._common_to_fill(wave)
            if self.computes_equal_once:
                if common:
                    await self._fill_ahead([common])
            else:
                if common:
                    await self._fill([common])
                await self._fill_ahead(wave)
            self._common = common or self._common
        finally:
            if self._filled is filled:
                self._wave, self._filled = [], None
            filled.set_result(None)

    async def _collect(self) -> None:
        """Wait until the wave has stopped growing."""
        deadline = asyncio.get_running_loop().time() + LONGEST_WAVE_SECONDS
        size = 0
        while size < len(self._wave) and asyncio.get_running_loop().time() < deadline:
            size = len(self._wave)
            await asyncio.sleep(QUIET_SECONDS)

    async def _fill_ahead(self, wave: Sequence[Prompt]) -> None:
        """Send the prompts, and return when they are computed or `LEAD_SECONDS` ahead."""
        task = asyncio.create_task(_run(self._fill, wave))
        self._filling.add(task)
        task.add_done_callback(self._forget_task)
        done, _ = await asyncio.wait({task}, timeout=LEAD_SECONDS)
        if done and not task.cancelled():
            await task

    def _forget_task(self, task: "asyncio.Task[None]") -> None:
        """An error that came too late to be raised here is met by the groups themselves."""
        self._filling.discard(task)
        if not task.cancelled():
            task.exception()

    def _common_to_fill(self, wave: Sequence[Prompt]) -> Prompt:
        """The common beginning, where computing it once saves enough and it is not cached already; else nothing."""
        common = common_beginning(wave)
        saved = len(common) * (len(wave) - 1)
        return common if saved >= MIN_SAVED_TOKENS and self._common[: len(common)] != common else ()


async def _run(fill: Fill, prompts: Sequence[Prompt]) -> None:
    await fill(prompts)


def common_beginning(prompts: Sequence[Prompt]) -> Prompt:
    """The tokens that all prompts begin with."""
    first, last = min(prompts), max(prompts)  # what the extremes share, all share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
