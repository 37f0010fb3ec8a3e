"""`python -m graftwerk`."""

from graftwerk.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
