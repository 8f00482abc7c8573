"""`python -m cachefs`."""

from cachefs.cli import main

main()
