"""Lossless compression with models, whose file sizes prove their bits/dim.

Read the modules in this order: `stack` (uniform numbers), `coder` (exact maps that exchange bits),
`normal` (latents), `layers` (one rule per bijection), `pixels` (dequantization), `flow_codec` (one
batch), `archive` (the file) and `measure` (a comparison with the evaluation). `codec` is the
interface of all codecs, `pixelcnn_codec` and `rbm_codec` are those of other models, and `factory`
chooses one.
"""

from flowgen.utils import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Codec": "codec",
        "CompressionResult": "archive",
        "FlowCodec": "flow_codec",
        "Header": "archive",
        "PixelCNNCodec": "pixelcnn_codec",
        "RBMCodec": "rbm_codec",
        "compress": "archive",
        "decompress": "archive",
        "make_codec": "factory",
        "measure_compression": "measure",
        "read_header": "archive",
    },
)
