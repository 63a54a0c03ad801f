"""`python -m flowgen` is `flowgen`."""

from flowgen.cli import main

if __name__ == "__main__":
    main()
