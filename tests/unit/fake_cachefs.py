"""The real command line and daemon around a made-up file system: `python fake_cachefs.py BEHAVIOUR ARGUMENTS...`.

BEHAVIOUR: serve, unwritten (serve, but umount can't write all), refuse, crash, die (before it is ready).
"""

import os
import signal
import sys
import types
import warnings
from collections.abc import Mapping

import trio

from cachefs import controlserver, daemon, preflight
from cachefs.cli import helper, main
from cachefs.config import Config
from cachefs.errors import CachefsError
from cachefs.state import State

UNWRITTEN = {"path": "a/b", "offset": 4096, "length": 8192, "error": "No space left on device"}


def serve(config: Config, state: State, ready: daemon.Ready) -> int:
    if behaviour == "refuse":
        raise CachefsError("--metrics 127.0.0.1:9477 is taken: give another port")
    if behaviour == "crash":
        raise ZeroDivisionError("bug")
    if behaviour == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    warnings.warn("a library warns", stacklevel=1)
    print("a library prints", flush=True)
    return trio.run(_serve, config, state, ready)


async def _serve(config: Config, state: State, ready: daemon.Ready) -> int:
    unwritten = [UNWRITTEN] if behaviour == "unwritten" else []
    stopped = trio.Event()

    async def status(request: Mapping[str, object], send: controlserver.Send) -> None:
        await send({"done": True, "mountpoint": config.mountpoint, "metrics": None, "statistics": {"uptime_seconds": 1.5}})

    async def write_out(request: Mapping[str, object], send: controlserver.Send) -> None:
        await send({"dirty_bytes": 8192})
        await send({"done": True, "unwritten": unwritten})
        if request["command"] == "umount":
            stopped.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(controlserver.serve, state.socket_path, {"status": status, "umount": write_out, "sync": write_out})
        ready({"metrics": "http://127.0.0.1:1/metrics"})
        await stopped.wait()
        daemon.stopping(state)
        nursery.cancel_scope.cancel()
    return 1 if unwritten else 0


if __name__ == "__main__":
    behaviour = sys.argv.pop(1)
    preflight.FUSE_DEVICE = os.devnull
    mount = types.ModuleType("cachefs.mount")
    mount.serve = serve  # type: ignore[attr-defined]
    sys.modules["cachefs.mount"] = mount
    if sys.argv[1] == "helper":
        sys.exit(helper.run_helper(sys.argv[2:]))
    main()
