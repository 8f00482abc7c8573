"""A file system in front of a slow directory, through a page cache of its own."""

__version__ = "0.1.0"
