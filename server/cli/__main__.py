"""`python -m server.cli` is the `mta` command."""

from server.cli import main

main()
