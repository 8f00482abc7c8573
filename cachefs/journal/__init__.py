"""The journal: acknowledged writes outlive the daemon. See `cachefs.journal.journal` for what it keeps and why that is enough."""
