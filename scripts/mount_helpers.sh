#!/usr/bin/env bash
# Links this directory's mount helpers into /sbin, where mount(8) looks for them, or removes the links again.
# SBIN=/other/directory puts them elsewhere. Somebody else's file of that name is never touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sbin=${SBIN:-/sbin}
helpers=(mount.cachefs mount.fuse.cachefs)

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

is_ours() { [ -L "$1" ] && [ "$(readlink "$1")" = "$PWD/.venv/bin/${1##*/}" ]; }

may_link() {
    if [ ! -e "$1" ] && [ ! -L "$1" ]; then return 0; fi
    is_ours "$1" || { [ -L "$1" ] && [ ! -e "$1" ]; } || die "$1 is there already and is not ours: remove it first"
}

link() {
    local name
    for name in "${helpers[@]}"; do
        [ -x ".venv/bin/$name" ] || die "there is no .venv/bin/$name: run make install first"
        may_link "$sbin/$name"
    done
    for name in "${helpers[@]}"; do
        ln -sfn "$PWD/.venv/bin/$name" "$sbin/$name"
    done
    say "mount -t cachefs and fstab work now: $sbin/mount.cachefs, $sbin/mount.fuse.cachefs"
}

unlink_ours() {
    local name
    for name in "${helpers[@]}"; do
        if is_ours "$sbin/$name"; then
            rm -f "$sbin/$name"
            say "removed $sbin/$name"
        fi
    done
}

case ${1:-} in link | unlink) ;; *) die "usage: mount_helpers.sh link|unlink" ;; esac
[ -w "$sbin" ] || die "$sbin is not writable for you: run this as root (sudo make ...)"
case $1 in
    link) link ;;
    unlink) unlink_ours ;;
esac
