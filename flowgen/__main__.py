"""`python -m flowgen` is `flowgen`."""

from flowgen.cli import main

main()
