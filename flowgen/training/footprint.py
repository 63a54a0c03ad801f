"""What a batch will take of the memory, measured on a few images before any training."""

import torch
from torch import Tensor

from flowgen.bijections import can_be_recomputed
from flowgen.costs import check_fits, free_memory
from flowgen.data import Images
from flowgen.models import GenerativeModel
from flowgen.training.machine import Machine


def check_batch_fits(model: GenerativeModel, data: Images, machine: Machine, batch_size: int, parts: int) -> None:
    """Raises FlowgenError, with the largest batch that fits, where what one of its `parts` keeps for the backward pass does not."""
    sizes = [_kept(model, machine, *data.draw(0, count, 0)) for count in (2, 4)]
    each = max(0, sizes[1] - sizes[0]) // 2
    free = torch.cuda.mem_get_info(machine.device)[0] if machine.device.type == "cuda" else free_memory()
    spare = machine.memory == "keep" and can_be_recomputed(model)
    cure = ", more with trainer.accumulate=2" + ", or with trainer.memory=checkpoint" * spare
    check_fits("trainer.batch_size", batch_size, -(-each // parts), cure, free)


def _kept(model: GenerativeModel, machine: Machine, levels: Tensor, labels: Tensor | None) -> int:
    """Bytes of the tensors that the backward pass of a batch keeps."""
    kept: dict[int, int] = {}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # statistics of batches, and chains

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), machine.autocast():
        loss = model.forward(levels, labels)
        size = sum(kept.values())
    del loss
    for buffer, before in buffers:
        buffer.copy_(before)
    return size
