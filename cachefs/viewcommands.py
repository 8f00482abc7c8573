"""What the daemon does for `cachefs ls` and `stat`: it copies masks and counters, piece by piece, between requests.

A piece is what is copied without giving the turn away. A listing is true for each group of pages at one moment, not for all
of them at the same one. Extents are made by whoever asks (`cachefs/cache/residency.py`).
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import trio

from cachefs.cache.file import CachedFile
from cachefs.cache.residency import look_at, pack
from cachefs.controlserver import Handler, Send
from cachefs.errors import CachefsError
from cachefs.handle import Handle
from cachefs.inode import Inode
from cachefs.names import paths_of
from cachefs.stack import Stack

PIECE_GROUPS = 400  # ~5 ms
PIECE_INODES = 10_000  # looked at and found to have nothing cached: ~2 ms


class ViewCommands:
    """The handlers of one mount. Paths in requests are relative to it, as os.fsdecode gives them."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def handlers(self) -> dict[str, Handler]:
        return {"ls": self._ls, "stat": self._stat}

    async def _ls(self, request: Mapping[str, object], send: Send) -> None:
        """Sends {"files": [...]} over and over: a file with many groups comes in several entries of the same "inode"."""
        wanted = [os.fsencode(path) for path in texts(request, "paths")]
        for files in self._pieces(wanted):
            if files:
                await send({"files": files})
            await trio.lowlevel.checkpoint()

    def _pieces(self, wanted: Sequence[bytes]) -> Iterator[list[dict[str, object]]]:
        """The cached files at or below the paths `wanted` (none: all files); whatever may change does so between two pieces."""
        memory: dict[Inode, bytes | None] = {}
        piece: list[dict[str, object]] = []
        groups = 0
        for looked_at, inode in enumerate(list(self.stack.table), 1):
            if looked_at % PIECE_INODES == 0 or groups >= PIECE_GROUPS:
                yield piece
                piece, groups, memory = [], 0, {}
            file = inode.file
            if file is None or not file.resident_pages:
                continue
            paths = paths_of(inode, self.stack.table, memory)
            path = _shown(paths, wanted)
            if path is None:
                continue
            indexes = list(file.groups)
            for start in range(0, len(indexes), PIECE_GROUPS):
                if start:
                    yield piece
                    piece, memory = [], {}
                some = indexes[start : start + PIECE_GROUPS]
                piece.append(self._entry(inode, file, path if paths else None, some))
            groups += len(indexes) % PIECE_GROUPS + 1
        yield piece

    def _entry(self, inode: Inode, file: CachedFile, path: bytes | None, indexes: Sequence[int]) -> dict[str, object]:
        now = self.stack.cache.clock()
        found = [file.groups[index] for index in indexes if index in file.groups]
        return {
            "path": None if path is None else os.fsdecode(path),
            "inode": inode.node,
            "size": file.size,
            "page_hits": file.page_hits,
            "page_misses": file.page_misses,
            "groups": [pack(look_at(group, now)) for group in found],
        }

    async def _stat(self, request: Mapping[str, object], send: Send) -> None:
        path = text(request, "path")
        try:
            messages = await self.stack.io.ask(self._about, os.fsencode(path))
        except OSError as error:
            raise CachefsError(f"{path}: {error.strerror}") from None
        for message in messages:
            await send(message)

    async def _about(self, path: bytes) -> list[dict[str, object]]:
        """What there is to say of the regular file at a path, its groups in pieces."""
        async with self.stack.fs.at_path(path) as inode:
            if not inode.is_regular:
                raise CachefsError(f"{os.fsdecode(path) or 'the mountpoint'} is not a regular file: only those are cached")
            names = paths_of(inode, self.stack.table, {})
            handles = [handle for handle in self.stack.files.handles.values() if handle.inode is inode]
            messages: list[dict[str, object]] = [
                {
                    "names": [os.fsdecode(name) for name in names],
                    "size": inode.attributes().size,
                    "handles": [_describe(handle) for handle in handles],
                    "window_pages": self.stack.files.window_pages,
                }
            ]
            file = inode.file
            indexes = list(file.groups) if file is not None else []
            for start in range(0, len(indexes), PIECE_GROUPS):
                assert file is not None
                messages.append({"files": [self._entry(inode, file, path, indexes[start : start + PIECE_GROUPS])]})
                await trio.lowlevel.checkpoint()
            return messages


def texts(request: Mapping[str, object], name: str) -> list[str]:
    """The list of texts that a request has under `name`."""
    found = request.get(name, [])
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise CachefsError(f"{name} is a list of texts")
    return found


def text(request: Mapping[str, object], name: str) -> str:
    found = request.get(name)
    if not isinstance(found, str):
        raise CachefsError(f"{name} is a text")
    return found


def _shown(paths: list[bytes], wanted: Sequence[bytes]) -> bytes | None:
    """The name by which to show a file, or None: the first that is wanted."""
    if not wanted or b"" in wanted:
        return paths[0] if paths else b""
    for path in paths:
        for want in wanted:
            if path == want or path.startswith(want + b"/"):
                return path
    return None


def _describe(handle: Handle) -> dict[str, object]:
    return {
        "program": handle.account.name,
        "uid": handle.uid,
        "writable": handle.writable,
        "streams": handle.readahead.describe(),
    }
