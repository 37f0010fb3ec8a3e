"""The command line: one file per command; output, progress bars and exit codes are shared."""
