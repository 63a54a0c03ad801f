"""`python -m flowgen` runs the command line."""

from flowgen.cli import main

if __name__ == "__main__":
    main()
