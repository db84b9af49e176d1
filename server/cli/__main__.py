"""`python -m server.cli` is the `mta` command."""

from server.cli import main

if __name__ == "__main__":  # the processes of a build import this module too
    main()
