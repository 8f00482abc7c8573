#!/usr/bin/env bash
# Sets up this directory to run (`run`, `demo`), to test (`test`), to measure (`bench`) or to check (`lint`) cachefs: Debian packages that are
# missing, .venv, the pinned Python packages and the project itself. Does nothing, quickly, when all is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

purpose=${1:-run}
run_packages=(fuse3 libfuse3-dev pkg-config gcc libc6-dev)
demo_packages=(git sqlite3)
test_packages=(
    "${demo_packages[@]}" make e2fsprogs rsync fio stress-ng prometheus systemd attr acl strace libaio-dev sshfs openssh-sftp-server
)
bench_packages=("${test_packages[@]}" bindfs mergerfs unionfs-fuse rclone openssh-client openssh-server)
optional_packages=() # tests that need one are skipped without it
case $purpose in
    run | lint) debian=("${run_packages[@]}") ;;
    demo) debian=("${run_packages[@]}" "${demo_packages[@]}") ;;
    test)
        debian=("${run_packages[@]}" "${test_packages[@]}")
        optional_packages=(chromium) # Ubuntu has it as a snap alone
        ;;
    bench) debian=("${run_packages[@]}" "${bench_packages[@]}") ;;
    *) echo "usage: setup.sh run|demo|test|bench|lint" >&2; exit 2 ;;
esac
case $purpose in
    run | demo) lock=requirements.lock ;;
    test | lint) lock=requirements-dev.lock ;;
    bench) lock=requirements-bench.lock ;;
esac

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The system's own Python first: one under a version manager can vanish, and .venv with it.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 /usr/bin/python3.1{3,2,1} python3 python3.1{3,2,1}; do
        candidate=$(command -v "$candidate") && new_enough "$candidate" && echo "$candidate" && return
    done
    return 1
}

# Names of the packages among "$@" that are not installed. A tool that came another way counts as installed.
missing_packages() {
    local package
    for package in "$@"; do
        case $package in
            fuse3) command -v fusermount3 ;;
            libfuse3-dev) command -v pkg-config && pkg-config --exists fuse3 ;;
            libc6-dev) test -e /usr/include/stdio.h ;;
            libaio-dev) test -e /usr/include/libaio.h ;;
            systemd) command -v systemd-analyze ;; # its checker of units
            attr) command -v setfattr ;;
            acl) command -v setfacl ;;
            e2fsprogs) command -v mkfs.ext4 ;;
            chromium) command -v chromium || command -v chromium-browser ;;
            openssh-client) command -v ssh ;;
            openssh-server) test -x /usr/sbin/sshd ;;
            openssh-sftp-server) test -e /usr/lib/openssh/sftp-server ;;
            *) command -v "$package" ;;
        esac >/dev/null 2>&1 || echo "$package"
    done
}

# Debian's packages for building a venv and extension modules with this Python.
missing_python_packages() {
    local name
    name=$(basename "$(readlink -f "$python")")
    [ "$python" != /usr/bin/python3 ] || name=python3
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$name-venv"
    test -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || echo "$name-dev"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

apt_install() {
    local log
    command -v apt-get >/dev/null || die "please install what Debian calls: $*"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || die "please run as root: apt-get install $*"
    say "installing Debian packages: $*"
    log=$(mktemp)
    # RUNLEVEL=1: no init script starts a service.
    if ! { [ -n "${lists_are_new:-}" ] || as_root apt-get update -qq >"$log" 2>&1; } ||
        ! as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
            apt-get install -y -qq --no-install-recommends "$@" >>"$log" 2>&1; then
        cat "$log" >&2
        die "apt-get failed; its messages are above"
    fi
    rm -f "$log"
    lists_are_new=yes
}

# Tests start Prometheus themselves, and the benchmark its sshd: the service must neither start now nor at the next boot.
install_without_service() {
    local service=$1 mask=/run/systemd/system/$1.service
    shift
    if [ -d /run/systemd/system ]; then
        as_root ln -sf /dev/null "$mask"
        # shellcheck disable=SC2064  # the name as it is now
        trap "as_root rm -f '$mask'" EXIT
    fi
    apt_install "$@"
    as_root deb-systemd-helper disable "$service.service" >/dev/null 2>&1 || true
    as_root update-rc.d "$service" disable >/dev/null 2>&1 || true
    if [ -d /run/systemd/system ]; then
        as_root rm -f "$mask"
        trap - EXIT
        as_root systemctl daemon-reload
    fi
}

install_debian() {
    local package rest=()
    for package in "$@"; do
        case $package in
            prometheus) install_without_service prometheus prometheus ;;
            openssh-server) install_without_service ssh openssh-server ;;
            *) rest+=("$package") ;;
        esac
    done
    [ ${#rest[@]} = 0 ] || apt_install "${rest[@]}"
}

# What .venv holds: this directory, its Python and the versions of one lock.
fingerprint() {
    { pwd; "$python" -VV; cat pyproject.toml requirements-build.lock "$1"; } | sha256sum | cut -d ' ' -f 1
}

has() {
    [ "$(cat ".venv/$1.done" 2>/dev/null)" = "$(fingerprint "$1")" ] && .venv/bin/python -c 'import pyfuse3' 2>/dev/null
}

# Both variables hold back pip's build environments; which one it reads depends on its version.
pip_install() {
    local pins=requirements-build.lock
    PIP_CONSTRAINT=$pins PIP_BUILD_CONSTRAINT=$pins PIP_DISABLE_PIP_VERSION_CHECK=1 \
        .venv/bin/python -m pip install -qq "$@" || die "pip failed at: $*"
}

make_venv() {
    say "making .venv with $("$python" -V) and the packages of requirements.lock"
    "$python" -m venv --clear .venv
    pip_install -r requirements.lock
    pip_install --no-deps --config-settings editable_mode=compat -e .
    fingerprint requirements.lock >.venv/requirements.lock.done
}

add_to_venv() {
    say "adding the packages of $1"
    pip_install -r "$1"
    fingerprint "$1" >".venv/$1.done"
}

if ! find_python >/dev/null && [ ! -e /usr/bin/python3 ] && command -v apt-get >/dev/null; then
    apt_install python3
fi
python=$(find_python) ||
    die "cachefs needs Python 3.11 or newer: install one (python3.11, python3.12 ...) or set PYTHON=/path/to/python3"
# shellcheck disable=SC2046  # package names, one a word
install_debian $(missing_packages "${debian[@]}" | sort -u) $(missing_python_packages)
for package in $(missing_packages "${optional_packages[@]}"); do
    (apt_install "$package") || say "tests that need $package are skipped"
done
has requirements.lock || make_venv
[ "$lock" = requirements.lock ] || has "$lock" || add_to_venv "$lock"
