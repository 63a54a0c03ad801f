"""The choice of a codec for a model."""

from importlib.util import find_spec

from flowgen.coding.codec import Codec
from flowgen.coding.flow_codec import FlowCodec
from flowgen.coding.pixelcnn_codec import PixelCNNCodec
from flowgen.coding.rbm_codec import RBMCodec
from flowgen.models.base import GenerativeModel
from flowgen.models.pixelcnn.pixelcnn import PixelCNN
from flowgen.models.rbm.rbm import RBM
from flowgen.utils.errors import UserError

DEFAULT_ANNEALING_STEPS = 1000


def make_codec(model: GenerativeModel, annealing_steps: int = DEFAULT_ANNEALING_STEPS) -> Codec:
    """Return the codec of a model.

    Args:
        model: A trained flow, PixelCNN or RBM.
        annealing_steps: Annealing steps of an RBM.

    Raises:
        UserError: If the model cannot compress images, or the package of the entropy coder is
            missing.
    """
    if not find_spec("constriction"):
        raise UserError(
            "compression needs the package constriction: pip install 'constriction>=0.5,<0.6'"
        )
    if isinstance(model, RBM):
        return RBMCodec(model, annealing_steps)
    if isinstance(model, PixelCNN):
        return PixelCNNCodec(model)
    return FlowCodec(model)
