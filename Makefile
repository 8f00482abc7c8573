# Each target does its own set-up first: Debian packages that are missing, .venv, pinned Python packages.
# PYTHON=/path/to/python3 chooses the interpreter; ARGS="-k fsync" goes to the program a target runs.

MAKEFLAGS += --no-print-directory
SETUP := @bash scripts/setup.sh
PY := .venv/bin/python
ARGS ?=
# Files of tests run side by side: much of the time goes into waiting for mounts.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install install-system uninstall-system test-setup demo test stress crash lint bench bench-full screenshot clean

help:  ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## set up to run: leaves .venv/bin/cachefs
	$(SETUP) run

install-system: install  ## as root: links in /sbin, so that mount -t cachefs and fstab work
	@bash scripts/mount_helpers.sh link

uninstall-system:  ## as root: removes these links
	@bash scripts/mount_helpers.sh unlink

test-setup:  ## set up to test: the programs that tests and benchmarks run on a mount
	$(SETUP) test

demo:  ## the main job in a minute: real programs on a slow store, cold and warm
	$(SETUP) demo
	@$(PY) scripts/demo.py $(ARGS)

test: test-setup  ## all tests but the slow ones
	@$(PY) -m pytest $(SIDE_BY_SIDE) $(ARGS)

stress: test-setup  ## the slow tests: stress-ng and random operations for minutes
	@$(PY) -m pytest -m slow --timeout 1800 -o faulthandler_timeout=1700 $(ARGS)

crash: test-setup  ## hundreds of kills of the daemon, and power cuts: nothing acknowledged may be lost
	@$(PY) -m pytest -m crash --timeout 3600 -o faulthandler_timeout=3500 $(ARGS)

lint:  ## ruff, and mypy --strict on both packages
	$(SETUP) lint
	@$(PY) -m ruff check .
	@$(PY) -m mypy

bench: test-setup  ## speed against the bare stack, the kernel's cache and the plain directory
	@$(PY) bench/run.py $(ARGS)

bench-full:  ## against bindfs, mergerfs, unionfs-fuse, rclone and sshfs: half an hour; ARGS="--only hits --rounds 2" is less
	$(SETUP) bench
	@$(PY) bench/full.py $(ARGS)

screenshot: test-setup  ## the page of a mount at work, as docs/page.png
	@$(PY) scripts/screenshot.py

clean:  ## remove everything that was made here, .venv too
	@rm -rf .venv build dist ./*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
