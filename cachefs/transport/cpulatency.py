"""Keeps idle processors ready to run while requests come one after another, and only then.

A program that reads from a mount sleeps until we have answered, and we sleep until it has asked. Between them they wake each
other up twice a request, and a processor that has gone to sleep takes longer for that than a hit: in a virtual machine, where
sleeping means to give the processor back to the host, several times as long. The kernel has an interface for programs that
cannot wait for that, PM QoS (Documentation/power/pm_qos_interface.rst): who holds /dev/cpu_dma_latency says how many
microseconds a processor may take to wake up, and what a process says is forgotten when it ends.
"""

import logging
import os
import struct
import time

log = logging.getLogger(__name__)

DEVICE = "/dev/cpu_dma_latency"  # root's
DRIVER = "/sys/devices/system/cpu/cpuidle/current_driver"
NO_DRIVER = ("", "none")
VIRTUAL_DRIVERS = ("haltpoll",)  # of guests: they have no sleep but the host's, and beside it to poll
LIGHT_SLEEP = 2  # microseconds: C1, where a core waits with its clock stopped
POLL = 0  # no sleep: an idle processor looks for work in a loop, which is no process's CPU time
POLLING_MOST = 8  # all idle processors do as one is told; so many may poll for one reader
NO_LIMIT = 2000 * 1_000_000  # linux/pm_qos.h: PM_QOS_CPU_LATENCY_DEFAULT_VALUE


class CpuLatency:
    """One request to the kernel: held or not.

    `usable` is False where it cannot be held, and stays so.
    """

    def __init__(self, wanted: bool, device: str = DEVICE, driver: str = DRIVER) -> None:
        self.held = False
        self._seconds = 0.0
        self._since = 0.0
        self._fd = -1
        self._limit = limit_microseconds(driver, len(os.sched_getaffinity(0)))
        if wanted and self._limit is not None:
            try:
                self._fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                log.debug("idle processors sleep as they like: %s: %s", device, error.strerror)

    @property
    def usable(self) -> bool:
        return self._fd >= 0

    @property
    def seconds(self) -> float:
        """For how long it has been held in all."""
        return self._seconds + (time.monotonic() - self._since if self.held else 0.0)

    def hold(self) -> None:
        """From now on idle processors stay ready."""
        if not self.held and self.usable:
            assert self._limit is not None
            self.held, self._since = self._say(self._limit), time.monotonic()

    def let_go(self) -> None:
        if self.held:
            self._seconds, self.held = self.seconds, False
            self._say(NO_LIMIT)

    def close(self) -> None:
        self.let_go()
        if self.usable:
            os.close(self._fd)
            self._fd = -1

    def _say(self, microseconds: int) -> bool:
        try:
            os.write(self._fd, struct.pack("=i", microseconds))
        except OSError as error:
            log.warning("idle processors sleep as they like: %s", error.strerror)
            os.close(self._fd)
            self._fd = -1
            return False
        return True


def limit_microseconds(driver: str, processors: int) -> int | None:
    """What to ask for; None: nothing, because it would help nobody or cost too much."""
    if processors < 2:
        return None
    try:
        with open(driver) as file:
            name = file.read().strip()
    except OSError:
        return None
    if name in NO_DRIVER:  # nobody asks then how deep a sleep may be
        return None
    if name not in VIRTUAL_DRIVERS:
        return LIGHT_SLEEP
    return POLL if processors <= POLLING_MOST else None
