"""Stores that can stand behind a cachefs mount; nothing here knows of FUSE or of the cache."""
