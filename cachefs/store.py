"""Which store a mount stands on: the directory, and the distance and faults to simulate in front of it."""

from pathlib import Path

from backing.base import Backing
from backing.directory import DirectoryBacking
from backing.faulty import FaultyBacking
from backing.latency import LatencyBacking
from cachefs import mountinfo
from cachefs.config import Config
from cachefs.errors import CachefsError

DISTANT = frozenset(("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "glusterfs", "lustre"))


def make_backing(config: Config) -> Backing:
    """The store that these settings describe, with its simulated faults and distance."""
    try:
        backing: Backing = DirectoryBacking(config.source, blocking=_is_distant(config))
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


def _is_distant(config: Config) -> bool:
    if config.backing != "auto":
        return config.backing == "network"
    path = Path(config.source)
    for candidate in (path, *path.parents):
        mount = mountinfo.top_mount(str(candidate))
        if mount is not None:
            return mount.fstype in DISTANT or mount.fstype.startswith("fuse")
    return False
