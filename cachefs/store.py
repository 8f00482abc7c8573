"""Which store a mount stands on: the directory, and the distance and faults to simulate in front of it."""

from pathlib import Path

from backing.base import Backing
from backing.direct import DirectDirectoryBacking
from backing.directory import DirectoryBacking
from backing.faulty import FaultyBacking
from backing.latency import LatencyBacking
from cachefs import mountinfo
from cachefs.config import Config
from cachefs.errors import CachefsError

DISTANT = frozenset(("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "glusterfs", "lustre"))
# They upload a whole file each time that it is flushed.
OBJECT_STORES = frozenset(("fuse.s3fs", "fuse.rclone", "fuse.goofys", "fuse.geesefs", "fuse.gcsfuse", "fuse.blobfuse2"))


def make_backing(config: Config) -> Backing:
    """The store that these settings describe, with its simulated faults and distance."""
    try:
        fstype = _fstype(config.source)
        blocking = _is_distant(fstype) if config.backing == "auto" else config.backing == "network"
        kind = DirectDirectoryBacking if blocking and _is_fuse(fstype) else DirectoryBacking
        backing: Backing = kind(config.source, blocking, flushes=fstype not in OBJECT_STORES)
    except OSError as error:
        raise CachefsError(f"cannot open SOURCE {config.source}: {error.strerror}") from None
    if config.fault_plan:
        backing = _with_faults(backing, config.fault_plan)
    if config.simulate_latency_seconds or config.simulate_bandwidth_bytes_per_second:
        bandwidth = config.simulate_bandwidth_bytes_per_second or float("inf")
        backing = LatencyBacking(backing, config.simulate_latency_seconds, bandwidth)
    return backing


def _with_faults(backing: Backing, plan: str) -> Backing:
    try:
        return FaultyBacking(backing, plan)
    except OSError as error:
        raise CachefsError(f"cannot open the fault plan {plan}: {error.strerror}") from None
    except ValueError as error:
        raise CachefsError(f"bad fault plan {plan}: {error}") from None


def _fstype(source: str) -> str:
    """The type of the file system that SOURCE is in, as in /proc/mounts."""
    path = Path(source)
    for candidate in (path, *path.parents):
        mount = mountinfo.top_mount(str(candidate))
        if mount is not None:
            return mount.fstype
    return ""


def _is_distant(fstype: str) -> bool:
    return fstype in DISTANT or _is_fuse(fstype)


def _is_fuse(fstype: str) -> bool:
    return fstype.startswith("fuse")
