"""`flowgen explore`: a page at 127.0.0.1 on which a trained model can be played with."""

from flowgen.page.app import Page
from flowgen.page.server import explore, open_server

__all__ = ["Page", "explore", "open_server"]
