"""What the daemon does for `cachefs top` and `map`: the figures of a moment with the files that lead, and all strips."""

import dataclasses
from collections.abc import Callable, Mapping

from cachefs.controlserver import Handler, Send
from cachefs.history import Sample
from cachefs.page.picture import Picture, Shown
from cachefs.statistics import Statistics

FILES_OF_EACH_ORDER = 50
STRIPS_AT_ONCE = 500


class PictureCommands:
    """The handlers of one mount."""

    def __init__(self, picture: Picture, statistics: Callable[[], Statistics]) -> None:
        self.picture, self.statistics = picture, statistics

    def handlers(self) -> dict[str, Handler]:
        return {"top": self._top, "picture": self._picture}

    async def _top(self, request: Mapping[str, object], send: Send) -> None:
        """Sends the statistics, the samples of the last minutes, and the files that lead in any order."""
        frame = await self.picture.look()
        files = await self.picture.hottest(FILES_OF_EACH_ORDER)
        await send(
            {
                "done": True,
                "time_seconds": frame.time_seconds,
                "fields": Sample._fields,
                "samples": frame.samples,
                "statistics": dataclasses.asdict(self.statistics()),
                "files": [_describe(shown) for shown in files],
            }
        )

    async def _picture(self, request: Mapping[str, object], send: Send) -> None:
        """Sends what the page shows: {"facts": ...}, then {"strips": JSON text of a list} over and over."""
        frame = await self.picture.look()
        await send({"facts": {**frame.facts, "time_seconds": frame.time_seconds}})
        for start in range(0, len(frame.strips), STRIPS_AT_ONCE):
            texts = [text for _, text in frame.strips[start : start + STRIPS_AT_ONCE]]
            await send({"strips": f"[{','.join(texts)}]"})


def _describe(shown: Shown) -> dict[str, object]:
    return {
        "path": shown.path,
        "inode": shown.node,
        "size": shown.size,
        "cached_bytes": shown.cached_bytes,
        "dirty_bytes": shown.dirty_bytes,
        "page_hits": shown.page_hits,
        "page_misses": shown.page_misses,
        "hits_per_second": shown.hits_per_second,
        "pinned": shown.pinned,
    }
