"""Compression of many images into one file, and back.

A file is the line `MAGIC`, the length of the header (4 bytes, little-endian), the header (JSON,
compressed by zlib), and the words of the stack (32 bits each, little-endian). The header holds
checksums of the model, of the words and of all images. A file may come from anyone, so everything
in it is checked before it is used.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgen.coding.codec import Codec, fingerprint
from flowgen.coding.coder import MARGIN, MAX_OFFSETS, Coder, NearBoundaryError
from flowgen.coding.stack import WORD_BITS, BitStack, CodingError, reserve_words
from flowgen.models.base import GenerativeModel
from flowgen.utils.console import Progress, no_progress
from flowgen.utils.errors import UserError, log, user_error
from flowgen.utils.memory import check_memory

MAGIC = b"FLOWGEN1\n"
LENGTH_BYTES = 4
MAX_HEADER_BYTES = 2**26  # after decompression
MAX_BATCH = 32  # images that are coded at once
MAX_NAME_LENGTH = 4096
RAW = MAX_OFFSETS  # in place of the number of an offset: the batch holds plain pixel values
DAMAGED = "the file is damaged or was not written by flowgen: copy it again from its source"
MISMATCH = (
    "the images do not match their checksum, so nothing was written: the file is damaged, the "
    "model has other settings, or this machine computes differently from the one that wrote the "
    "file; use the run and the machine that wrote it"
)


@dataclass(frozen=True)
class Header:
    """Everything in a file except the words.

    Attributes:
        model: Fingerprint of the model.
        run: Name of the run that the model was loaded from.
        tables: Checksum of the tables that depend on floats.
        batches: For each batch, its size and the number of its offset, or RAW.
        borrowed: Number of borrowed words.
        words: Checksum of the words.
        images: Hash of all pixel values.
        names: Names of the images, or None for numbers.
        annealing_steps: Annealing steps of an RBM, or 0.
    """

    model: str
    run: str
    tables: int
    batches: list[list[int]]
    borrowed: int
    words: int
    images: str
    names: list[str] | None
    annealing_steps: int

    @property
    def num_images(self) -> int:
        """Number of images in the file."""
        return sum(size for size, _ in self.batches)


@dataclass(frozen=True)
class CompressionResult:
    """A compressed file and its measurements.

    Attributes:
        data: The file.
        num_images: Number of images.
        dimensions: Numbers per image.
        net_bits: Bits that the images added to the stack.
        model_bits: Bits of the images by the model itself, or NaN; see `Codec.length_description`.
        raw_images: Images that were stored without compression.
        retries: Batches that were coded again with another offset.
    """

    data: bytes
    num_images: int
    dimensions: int
    net_bits: float
    model_bits: float
    raw_images: int
    retries: int

    @property
    def bits_per_dim(self) -> float:
        """Bits per number of the whole file."""
        return 8 * len(self.data) / (self.num_images * self.dimensions)

    @property
    def net_bits_per_dim(self) -> float:
        """Bits per number without the fixed cost: the borrowed bits and the header."""
        return self.net_bits / (self.num_images * self.dimensions)

    @property
    def model_bits_per_dim(self) -> float:
        """Bits per number by the model itself."""
        return self.model_bits / (self.num_images * self.dimensions)


class Compressor:
    """Puts images on a stack, batch by batch.

    Args:
        codec: The codec of the model.
        verify: Whether to decode each batch again and compare it.
    """

    def __init__(self, codec: Codec, verify: bool):
        self.codec = codec
        self.verify = verify
        self.stack = BitStack(reserve_words(codec.noise_bits))
        self.coder = Coder(self.stack, codec.grid_bits)
        self.initial_bits = self.stack.num_bits
        self.batches: list[list[int]] = []
        self.model_bits = 0.0
        self.retries = 0
        self.digest = hashlib.sha256()

    @property
    def net_bits(self) -> int:
        """Bits without those that the codec borrowed."""
        return self.stack.num_bits - self.initial_bits

    def next_batch_size(self) -> int:
        """Return how many images to code at once: more images borrow more bits."""
        size = 2 * self.net_bits // (3 * self.codec.noise_bits)
        return max(1, min(size, MAX_BATCH))

    def add(self, images: Tensor) -> None:
        """Code one batch."""
        self.digest.update(images.numpy().tobytes())
        for index in range(MAX_OFFSETS):
            try:
                bits = self._try(images, index)
            except NearBoundaryError:
                self.retries += 1
                continue
            except CodingError:
                break
            self.batches.append([len(images), index])
            self.model_bits += bits
            return
        _push_raw(self.coder, images, self.codec.bins)
        self.batches.append([len(images), RAW])
        self.model_bits += math.log2(self.codec.bins) * images.numel()

    def _try(self, images: Tensor, index: int) -> float:
        """Code a batch with an offset, or restore the stack and raise CodingError."""
        before = self.stack.save()
        lowest = self.stack.lowest
        self.coder.choose_offset(index)
        try:
            self.coder.margin = MARGIN
            self.stack.scramble(_noise_words(self.codec, len(images)))
            bits = self.codec.encode(images, self.coder)
            if self.verify:
                self._verify(images, before)
        except CodingError:
            self.stack.restore(before)
            self.stack.lowest = lowest
            raise
        return float(bits.sum())

    def _verify(self, images: Tensor, before: NDArray[np.uint32]) -> None:
        after = self.stack.save()
        lowest = self.stack.lowest
        self.coder.margin = 0.0
        decoded = self.codec.decode(len(images), self.coder)
        self.stack.scramble(_noise_words(self.codec, len(images)))
        if not torch.equal(decoded, images) or not np.array_equal(self.stack.save(), before):
            raise CodingError("decoding does not restore the images")
        self.stack.restore(after)
        self.stack.lowest = lowest


def compress(
    codec: Codec,
    images: Tensor,
    run: str,
    names: Sequence[str] | None = None,
    verify: bool = True,
    progress: Progress = no_progress,
) -> CompressionResult:
    """Compress images with a model.

    Args:
        codec: The codec of the model.
        images: Pixel values, uint8 (N, channels, height, width).
        run: Name of the run of the model, which the file records.
        names: Names of the images, or None for numbers.
        verify: Whether to decode each batch again and compare it.
        progress: Wrapper of the loop over the images.
    """
    if not len(images):
        raise UserError("there is no image to compress: give images, or choose a split of the data")
    images = images.cpu().contiguous()
    compressor = Compressor(codec, verify)
    remaining = iter(progress(images, "images", len(images)))
    while chunk := list(islice(remaining, compressor.next_batch_size())):
        compressor.add(torch.stack(chunk))
    raw_images = sum(size for size, index in compressor.batches if index == RAW)
    if raw_images:
        log.warning(
            "%d of %d images are stored without compression, because %s",
            raw_images,
            len(images),
            "decoding did not restore them, or they are far from the training images",
        )
    borrowed, words = compressor.stack.to_words()
    payload = words.astype("<u4").tobytes()
    header = Header(
        model=fingerprint(codec.model),
        run=run,
        tables=codec.checksum(),
        batches=compressor.batches,
        borrowed=borrowed,
        words=zlib.crc32(payload),
        images=compressor.digest.hexdigest(),
        names=None if names is None else list(names),
        annealing_steps=codec.annealing_steps,
    )
    return CompressionResult(
        data=_pack(header) + payload,
        num_images=len(images),
        dimensions=codec.dimensions,
        net_bits=compressor.net_bits,
        model_bits=compressor.model_bits,
        raw_images=raw_images,
        retries=compressor.retries,
    )


def decompress(
    codec: Codec, header: Header, payload: bytes, progress: Progress = no_progress
) -> Tensor:
    """Return the images of a file, uint8 (N, channels, height, width).

    Args:
        codec: The codec of the model that compressed them.
        header: The header of the file, see `read_header`.
        payload: The words of the file.
        progress: Wrapper of the loop over the images.

    Raises:
        UserError: If the file is damaged or belongs to another model.
    """
    check_model(header, codec.model)
    if header.tables != codec.checksum():
        raise UserError(MISMATCH)
    check_memory("the number of images", header.num_images, 2 * codec.dimensions)
    try:
        images = _decode_all(codec, header, payload, progress)
    except CodingError as error:
        raise UserError(MISMATCH) from error
    if hashlib.sha256(images.numpy().tobytes()).hexdigest() != header.images:
        raise UserError(MISMATCH)
    return images


def check_model(header: Header, model: GenerativeModel) -> None:
    """Raise UserError unless this model compressed the images of a file."""
    if header.model != fingerprint(model):
        raise UserError(
            f"the file was written with another model ({header.run}): give the same weights "
            "with --run"
        )


def _decode_all(codec: Codec, header: Header, payload: bytes, progress: Progress) -> Tensor:
    reserve = reserve_words(codec.noise_bits)
    words = np.frombuffer(payload, "<u4").astype(np.uint32)
    stack = BitStack(reserve, header.borrowed, words)
    coder = Coder(stack, codec.grid_bits)
    images = torch.empty((header.num_images, *codec.image_shape), dtype=torch.uint8)
    steps = iter(progress(range(len(images)), "images", len(images)))
    end = len(images)
    for size, index in reversed(header.batches):
        shape = (size, *codec.image_shape)
        if index == RAW:
            batch = _pop_raw(coder, torch.Size(shape), codec.bins)
        else:
            coder.choose_offset(index)
            batch = codec.decode(size, coder)
            stack.scramble(_noise_words(codec, size))
        images[end - size : end] = batch
        end -= size
        for _ in islice(steps, size):
            pass
    if not stack.is_initial():
        raise CodingError("the stack does not return to its start")
    return images


def _noise_words(codec: Codec, count: int) -> int:
    """Return about the number of words that the noise of `count` images takes."""
    return count * codec.noise_bits // WORD_BITS


def _push_raw(coder: Coder, images: Tensor, bins: int) -> None:
    values = images.long().reshape(-1)
    coder.push(values, torch.full_like(values, bins))


def _pop_raw(coder: Coder, shape: torch.Size, bins: int) -> Tensor:
    values = coder.pop(torch.full((shape.numel(),), bins))
    return values.to(torch.uint8).view(shape)


def _pack(header: Header) -> bytes:
    text = json.dumps(asdict(header), separators=(",", ":"), ensure_ascii=True)
    if len(text) > MAX_HEADER_BYTES:
        raise UserError("the names of the images are too long for one file: compress fewer images")
    packed = zlib.compress(text.encode(), 9)
    return MAGIC + len(packed).to_bytes(LENGTH_BYTES, "little") + packed


def read_header(data: bytes) -> tuple[Header, bytes]:
    """Check a file and split it into its header and its words.

    Raises:
        UserError: If it is not a complete file of `compress`.
    """
    if not data.startswith(MAGIC):
        raise UserError("this is not a file of `flowgen compress`: choose a file that it wrote")
    start = len(MAGIC) + LENGTH_BYTES
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    with user_error(DAMAGED):
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data[start:end], MAX_HEADER_BYTES)
        values = json.loads(text)
        is_complete = unpacker.eof and not unpacker.unused_data and len(data) >= end
        header = Header(**values)
    payload = data[end:]
    is_valid = is_complete and _is_valid(header) and zlib.crc32(payload) == header.words
    if not is_valid or len(payload) % (WORD_BITS // 8):
        raise UserError(DAMAGED)
    return header, payload


def _is_valid(header: Header) -> bool:
    """Return whether all values of a header have the right types and limits."""
    return all(_checks(header))


def _checks(header: Header) -> Iterator[bool]:
    """Yield the results of checks, each of which relies on the ones before it."""
    for name in ("model", "run", "images"):
        yield type(getattr(header, name)) is str
    for name in ("tables", "borrowed", "words", "annealing_steps"):
        yield type(getattr(header, name)) is int
    yield header.borrowed >= 0 and len(header.run) <= MAX_NAME_LENGTH
    yield isinstance(header.batches, list) and len(header.batches) > 0
    for batch in header.batches:
        yield isinstance(batch, list) and len(batch) == 2 and all(type(v) is int for v in batch)
        size, index = batch
        yield 1 <= size <= MAX_BATCH and 0 <= index <= RAW
    if header.names is not None:
        yield isinstance(header.names, list) and len(header.names) == header.num_images
        for name in header.names:
            yield isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH
