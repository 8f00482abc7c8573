"""What the daemon does for `cachefs warm`, `pin`, `unpin`, `drop` and `set`: what is to be in the cache, and what not."""

import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping

import trio

from cachefs.cache import wishes
from cachefs.cache.file import CachedFile
from cachefs.cache.page import PAGE_SHIFT, PAGE_SIZE
from cachefs.config import changed
from cachefs.controlserver import Handler, Send
from cachefs.errors import CachefsError
from cachefs.inode import Inode
from cachefs.names import files_below, paths_of
from cachefs.pins import Pin, is_at_or_below
from cachefs.settings import Settings
from cachefs.stack import Stack
from cachefs.viewcommands import PIECE_GROUPS, PIECE_INODES, texts
from cachefs.warm import WHOLE_FILE, Warming, budget_pages, pages_of

PROGRESS_SECONDS = 0.1
FILES_AT_ONCE = 8


class KeepCommands:
    """The handlers of one mount. Paths in requests are relative to it. `dropped(inode)` is told of files dropped on request."""

    def __init__(self, stack: Stack, settings: Settings, dropped: Callable[[Inode], None]) -> None:
        self.stack = stack
        self.settings = settings
        self.dropped = dropped

    def handlers(self) -> dict[str, Handler]:
        return {
            "warm": self._warm, "pin": self._pin, "unpin": self._unpin, "pins": self._pins, "drop": self._drop, "set": self._set,
        }  # fmt: skip

    # --- warm ----------------------------------------------------------------------------------------------------------

    async def _warm(self, request: Mapping[str, object], send: Send) -> None:
        """Sends {"done_bytes", "total_bytes"} as it goes on, and stops when nobody takes them any more."""
        first = _page(request, "start", 0)
        end = _page(request, "end", WHOLE_FILE)
        found = await self._files(texts(request, "paths"))
        warming = Warming(self.stack.files, budget_pages(self.stack.files))
        failed: list[dict[str, str]] = []
        todo = iter(found)
        total_pages = sum(max(0, min(end, pages_of(size)) - first) for _, size in found)

        async def worker() -> None:
            for path, _ in todo:
                if warming.full:
                    return
                try:
                    async with self.stack.fs.at_path(path) as inode:
                        await warming.file(inode, first, end)
                except OSError as error:
                    failed.append({"path": os.fsdecode(path), "error": error.strerror or str(error)})

        def report() -> dict[str, object]:
            done, total = min(warming.done_pages, total_pages) * PAGE_SIZE, total_pages * PAGE_SIZE
            return {"done_bytes": done, "total_bytes": total, "files": len(found)}

        await self._reporting(send, report, *[worker] * FILES_AT_ONCE)
        await send({**report(), "done": True, "full": warming.full, "failed": failed})

    async def _reporting(
        self, send: Send, report: Callable[[], dict[str, object]], *work: Callable[[], Awaitable[object]]
    ) -> None:
        """Runs tasks side by side, and says how far they are; cancels them when the client is gone."""
        async with trio.open_nursery() as nursery:

            async def reporter() -> None:
                while await send(report()) is not False:
                    await trio.sleep(PROGRESS_SECONDS)
                nursery.cancel_scope.cancel()

            async with trio.open_nursery() as workers:
                nursery.start_soon(reporter)
                for task in work:
                    workers.start_soon(task)
            nursery.cancel_scope.cancel()

    async def _files(self, paths: Iterable[str]) -> list[tuple[bytes, int]]:
        """The regular files at and below these paths, each with its size, in order and once."""
        found: dict[bytes, int] = {}
        for path in paths:
            try:
                found |= await self.stack.io.ask(files_below, self.stack.fs, os.fsencode(path))
            except OSError as error:
                raise CachefsError(f"{path}: {error.strerror}") from None
        return list(found.items())

    # --- pins ----------------------------------------------------------------------------------------------------------

    async def _pin(self, request: Mapping[str, object], send: Send) -> None:
        """Pins, and answers when the files are in memory, as far as they can be."""
        files = await self._files(texts(request, "paths"))
        pins = self.stack.pins
        await pins.add(files)
        ours = [pin for path, _ in files if (pin := pins.pins.get(path)) is not None]

        def report() -> dict[str, object]:
            sizes = [(pin.size, pin.inode.file.cached_bytes if pin.inode and pin.inode.file else 0) for pin in ours]
            return {"total_bytes": sum(size for size, _ in sizes), "done_bytes": sum(cached for _, cached in sizes)}

        async def until_looked_at() -> None:
            for _ in range(2):  # the look under way may be past them
                pins.kick()
                await pins.looked.park()

        await self._reporting(send, report, until_looked_at)
        await send({"done": True, **report(), "pins": [_describe(pin) for pin in ours]})

    async def _unpin(self, request: Mapping[str, object], send: Send) -> None:
        count = 0
        for path in texts(request, "paths"):
            gone = await self.stack.pins.remove([os.fsencode(path)])
            if not gone:
                raise CachefsError(f"{path or 'nothing here'} is not pinned: cachefs pin lists what is")
            count += gone
        await send({"done": True, "files": count})

    async def _pins(self, request: Mapping[str, object], send: Send) -> None:
        for pin in list(self.stack.pins.pins.values()):
            await send({"pins": [_describe(pin)]})

    # --- drop and set --------------------------------------------------------------------------------------------------

    async def _drop(self, request: Mapping[str, object], send: Send) -> None:
        """Answers with what went and what stayed, in bytes, the latter by reason."""
        wanted = [os.fsencode(path) for path in texts(request, "paths")]
        dropped, stayed, files = 0, Counter[str](), 0
        memory: dict[Inode, bytes | None] = {}
        for looked_at, inode in enumerate(list(self.stack.table), 1):
            if looked_at % PIECE_INODES == 0:
                memory = {}
                await trio.lowlevel.checkpoint()
            file = inode.file
            if file is None or not file.resident_pages:
                continue
            if not any(is_at_or_below(path, wanted) for path in paths_of(inode, self.stack.table, memory)):
                continue
            files += 1
            indexes = list(file.groups)
            for start in range(0, len(indexes), PIECE_GROUPS):
                some = indexes[start : start + PIECE_GROUPS]
                dropped += wishes.drop(self.stack.cache, file, some)
                stayed += _left(file, some)
                memory = {}
                await trio.lowlevel.checkpoint()
            self.dropped(inode)
            self.stack.fs.drop(inode)
        kept = {reason: pages * PAGE_SIZE for reason, pages in stayed.items() if pages}
        await send({"done": True, "dropped_bytes": dropped * PAGE_SIZE, "stayed": kept, "files": files})

    async def _set(self, request: Mapping[str, object], send: Send) -> None:
        settings = request.get("settings")
        if not isinstance(settings, dict) or not all(isinstance(value, str) for value in settings.values()):
            raise CachefsError("settings are names with texts")
        new = await self.settings.apply(lambda config: changed(config, settings))
        in_effect = {"cache_size_bytes": new.cache_size_bytes, "policy": new.policy, "pin_limit_bytes": new.pin_limit_bytes}
        await send({"done": True, **in_effect})


def _left(file: CachedFile, indexes: Iterable[int]) -> Counter[str]:
    """Pages that are still there, by what keeps them."""
    count: Counter[str] = Counter()
    for group in filter(None, map(file.groups.get, indexes)):
        unwritten = group.dirty | group.writeback
        count["unwritten"] += unwritten.bit_count()
        count["filling"] += group.filling.bit_count()
        count["pinned"] += (group.uptodate & group.pinned & ~unwritten).bit_count()
    return count


def _page(request: Mapping[str, object], name: str, default: int) -> int:
    """The page at a position in bytes: the one it lies in for a start, the one behind for an end."""
    nbytes = request.get(name)
    if nbytes is None:
        return default
    if not isinstance(nbytes, int) or nbytes < 0:
        raise CachefsError(f"{name} is a number of bytes")
    return nbytes >> PAGE_SHIFT if name == "start" else pages_of(nbytes)


def _describe(pin: Pin) -> dict[str, object]:
    cached = pin.inode.file.cached_bytes if pin.inode is not None and pin.inode.file is not None else 0
    return {"path": os.fsdecode(pin.path), "size": pin.size, "cached_bytes": cached, "state": pin.state}
