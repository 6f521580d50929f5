"""Fills SGLang's prefix cache ahead of the groups that need it, for several groups at once.

SGLang computes every prompt of a batch, even if G of them are equal, and each push empties its cache. So prompts that
start at about the same time form a wave. A request without new tokens computes their common beginning, and a second one
computes each distinct prompt once. The groups need not wait for the second answer: SGLang serves requests in order, so
a group that arrives meanwhile finds its prompt in the cache and shares the next forward pass. If the engine computes
equal prompts once by itself (`inside.prefill`), only the common beginning is sent. Invariant: this changes what is
computed, never what is sampled. If a wave fails, its groups continue, and meet the error themselves.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

Prompt = tuple[int, ...]
Fill = Callable[[Sequence[Prompt]], Awaitable[None]]

QUIET_SECONDS = 0.008  # a wave ends if no prompt has joined for this long; taking a ticket needs about 2 ms
LONGEST_WAVE_SECONDS = 0.05
LEAD_SECONDS = 0.02  # prompts are sent this long before their groups, so that SGLang takes them up first
MIN_SAVED_TOKENS = 64  # fewer are not worth a forward pass of their own


class PrefixWaves:
    """Joins the prompts of groups that start together into waves."""

    def __init__(self, fill: Fill) -> None:
        """`fill`: puts prompts into the engine's cache."""
        self.computes_equal_once = False  # whether the engine computes the equal prompts of a batch once
        self._fill = fill
        self._wave: list[Prompt] = []
        self._filled: asyncio.Future[None] | None = None
        self._common: Prompt = ()
        self._filling: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Cancel the requests that still fill the cache."""
        for task in self._filling:
            task.cancel()
        await asyncio.gather(*self._filling, return_exceptions=True)

    def forget(self) -> None:
        """Note that the engine's cache has been emptied."""
        self._common = ()

    def computed(self, tokens: Prompt) -> None:
        """Note that the cache has these tokens, since another request has computed them."""
        self._common = tokens

    async def fill(self, prompt: Prompt) -> None:
        """Return when the prompt is in the cache, or will be before the next request; or when its wave has failed."""
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
        """Send the prompts; return when they are computed, or after `LEAD_SECONDS`."""
        task = asyncio.create_task(_run(self._fill, wave))
        self._filling.add(task)
        task.add_done_callback(self._forget_task)
        done, _ = await asyncio.wait({task}, timeout=LEAD_SECONDS)
        if done and not task.cancelled():
            await task

    def _forget_task(self, task: "asyncio.Task[None]") -> None:
        """Ignore an error that came too late to be raised here: the groups will meet it themselves."""
        self._filling.discard(task)
        if not task.cancelled():
            task.exception()

    def _common_to_fill(self, wave: Sequence[Prompt]) -> Prompt:
        """The common beginning if computing it once saves enough and it is not cached yet; else nothing."""
        common = common_beginning(wave)
        saved = len(common) * (len(wave) - 1)
        return common if saved >= MIN_SAVED_TOKENS and self._common[: len(common)] != common else ()


async def _run(fill: Fill, prompts: Sequence[Prompt]) -> None:
    await fill(prompts)


def common_beginning(prompts: Sequence[Prompt]) -> Prompt:
    """The tokens that all prompts begin with."""
    first, last = min(prompts), max(prompts)  # what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
