"""Variational autoencoder: model, networks, and distributions of the latents."""

from flowgen.utils import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"latents": "latents", "networks": "networks", "vae": "vae", "VAE": "vae"}
)
