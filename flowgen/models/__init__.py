"""Models of images: flows, PixelCNN, VAE, VQ-VAE, diffusion, RBM and GAN.

Names are imported on first use, so that one model does not import all others.
"""

from flowgen.utils import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "base": "base",
        "diffusion": "diffusion",
        "flows": "flows",
        "gan": "gan",
        "likelihood": "likelihood",
        "pixelcnn": "pixelcnn",
        "rbm": "rbm",
        "vae": "vae",
        "vqvae": "vqvae",
        "Capability": "base",
        "ClassConditional": "base",
        "EvalConfig": "base",
        "GenerativeModel": "base",
        "InpaintingResult": "base",
        "LikelihoodModel": "likelihood",
        "LinearMeasurement": "base",
        "SupportsCompression": "base",
        "SupportsInpainting": "base",
        "SupportsMCMC": "base",
        "SupportsTokenSampling": "base",
        "Flow": "flows.flow",
        "FlowGAN": "flows.flow_gan",
        "FlowMatching": "flows.flow_matching",
        "Glow": "flows.glow",
        "Jet": "flows.jet",
        "IAF": "flows.maf",
        "MAF": "flows.maf",
        "NICE": "flows.nice",
        "PlanarFlow": "flows.planar",
        "SylvesterFlow": "flows.planar",
        "RealNVP": "flows.realnvp",
        "ReverseKL": "flows.reverse_kl",
        "TarFlow": "flows.tarflow",
        "GAN": "gan",
        "PixelCNN": "pixelcnn.pixelcnn",
        "RBM": "rbm.rbm",
        "VariationalDiffusion": "diffusion",
        "VAE": "vae.vae",
        "VQVAE": "vqvae",
    },
)
