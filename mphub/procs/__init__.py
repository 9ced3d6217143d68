"""Who runs: one file per kind of process."""
