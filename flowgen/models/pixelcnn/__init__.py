"""PixelCNN: model and networks."""

from flowgen.utils import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"networks": "networks", "pixelcnn": "pixelcnn", "PixelCNN": "pixelcnn"}
)
