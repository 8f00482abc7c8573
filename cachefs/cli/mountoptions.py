"""What stands behind -o and in the fourth field of fstab, read as mount(8) means it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cachefs.config import MOUNT_FLAGS, OPTIONS, nearest
from cachefs.errors import UsageError
from cachefs.rules import SEPARATOR

_NAMES = {option.name: option for option in OPTIONS}
_ATIME_FLAGS = frozenset({"noatime", "relatime", "strictatime"})  # one of them at a time
_ON_BY_DEFAULT = {"suid": "nosuid", "dev": "nodev"}  # as in every FUSE file system: only these words switch them off
_NEGATIONS = {
    **_ON_BY_DEFAULT, "exec": "noexec", "atime": "noatime", "diratime": "nodiratime",
    "norelatime": "relatime", "nostrictatime": "strictatime", "symfollow": "nosymfollow",
}  # fmt: skip
_IMPLIED_FLAGS = {
    "user": ("nosuid", "nodev", "noexec"), "users": ("nosuid", "nodev", "noexec"),
    "owner": ("nosuid", "nodev"), "group": ("nosuid", "nodev"),
}  # fmt: skip
# For mount(8), systemd and the boot scripts, or always so here: nothing to do.
_FOR_OTHERS = frozenset({
    "defaults", "auto", "noauto", "nouser", "nousers", "noowner", "nogroup", "_netdev", "nofail", "async", "nolazytime",
    "silent", "loud", "default_permissions", "comment", "uhelper", "helper",
    "user_id", "group_id", "rootmode", "max_read", "blksize",  # the kernel's of a live mount: mount(8) repeats them to remount
})  # fmt: skip
_REFUSED = {
    "sync": "cachefs holds writes back: use fsync, or --dirty-expire 0s",
    "dirsync": "cachefs can't promise it: use fsync",
    "lazytime": "cachefs can't promise it: use noatime",
    "bind": "it is for mount(8) alone: mount --bind",
    "blkdev": "SOURCE is a directory",
}


@dataclass
class MountOptions:
    """Words of -o, sorted: values for `make_config`, flags for the kernel, and what to do at all."""

    values: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    fsname: str | None = None
    remount: bool = False


def parse_mount_options(texts: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """All words of all -o in order, later ones winning; UsageError for an unknown word unless `sloppy`."""
    options = MountOptions()
    for text in texts:
        for word in re.split(r"(?<!\\),", text):
            if word:
                _take(options, word.replace("\\,", ","), sloppy)
    return options


def _take(options: MountOptions, word: str, sloppy: bool) -> None:
    key, equals, value = word.partition("=")
    name = key.replace("-", "_")
    if key in ("ro", "rw"):
        options.values["read_only"] = "yes" if key == "ro" else "no"
    elif key == "remount":
        options.remount = True
    elif key in ("fsname", "subtype"):
        options.fsname = value if key == "fsname" else options.fsname
    elif name in _NAMES:
        _take_value(options, name, equals, value)
    elif not _take_flag(options, key) and not _is_for_others(key) and not sloppy:
        _refuse(key)


def _take_value(options: MountOptions, name: str, equals: str, value: str) -> None:
    is_flag = not _NAMES[name].metavar
    if not is_flag and not equals:
        raise UsageError(f"-o {name} needs a value: {name}={_NAMES[name].metavar}")
    if _NAMES[name].repeatable and name in options.values:
        value = options.values[name] + SEPARATOR + value
    options.values[name] = value or "yes" if is_flag else value


def _take_flag(options: MountOptions, key: str) -> bool:
    if key in MOUNT_FLAGS:
        options.flags -= _ATIME_FLAGS if key in _ATIME_FLAGS else set()
        options.flags -= {word for word, flag in _ON_BY_DEFAULT.items() if flag == key}
        options.flags.add(key)
    elif key in _NEGATIONS:
        options.flags.discard(_NEGATIONS[key])
        options.flags |= {key} & _ON_BY_DEFAULT.keys()
    elif key in _IMPLIED_FLAGS:
        for flag in _IMPLIED_FLAGS[key]:
            _take_flag(options, flag)
    else:
        return False
    return True


def _is_for_others(key: str) -> bool:
    return key in _FOR_OTHERS or key.startswith(("x-", "X-"))


def _refuse(key: str) -> None:
    if key in _REFUSED:
        raise UsageError(f"-o {key} is not possible: {_REFUSED[key]}")
    known = (*_NAMES, *MOUNT_FLAGS, *_NEGATIONS, *_IMPLIED_FLAGS, *_FOR_OTHERS, "ro", "rw", "remount", "fsname")
    raise UsageError(f"no such mount option: {key}{nearest(key.replace('-', '_'), known)}")


def changes_on_remount(recorded: Mapping[str, object], asked: Mapping[str, object], options: MountOptions) -> list[str]:
    """Names of what these options would change of a live mount; both mappings are `Config`s as dictionaries."""
    changed = [
        name
        for name in options.values
        if any(asked[key] != recorded.get(key) for key in asked if _belongs(key, name) and key != "metrics_asked")
    ]
    flags = recorded.get("mount_flags")
    old_flags = {str(flag) for flag in flags} if isinstance(flags, list | tuple) else set()
    return changed + sorted(_in_effect(options.flags) ^ _in_effect(old_flags))


def _in_effect(flags: set[str]) -> set[str]:
    """The flags that a mount has when it is asked for these."""
    implied = {flag for word, flag in _ON_BY_DEFAULT.items() if word not in flags}
    return (flags | implied) - {"relatime", *_ON_BY_DEFAULT}


def _belongs(key: str, name: str) -> bool:
    return key == name or key.startswith(name + "_")
