"""The choice of a codec for a model."""

from flowgen.coding.codec import Codec
from flowgen.coding.flow_codec import FlowCodec
from flowgen.coding.pixelcnn_codec import PixelCNNCodec
from flowgen.coding.rbm_codec import RBMCodec
from flowgen.models.base import GenerativeModel
from flowgen.models.pixelcnn.pixelcnn import PixelCNN
from flowgen.models.rbm.rbm import RBM

DEFAULT_ANNEALING_STEPS = 1000


def make_codec(model: GenerativeModel, annealing_steps: int = DEFAULT_ANNEALING_STEPS) -> Codec:
    """Return the codec of a model.

    Args:
        model: A trained flow, PixelCNN or RBM.
        annealing_steps: Annealing steps of an RBM.

    Raises:
        UserError: If the model cannot compress images; it says why.
    """
    if isinstance(model, RBM):
        return RBMCodec(model, annealing_steps)
    if isinstance(model, PixelCNN):
        return PixelCNNCodec(model)
    return FlowCodec(model)
