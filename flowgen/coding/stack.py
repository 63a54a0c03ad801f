"""A stack of bits on which uniform whole numbers are pushed and popped.

Pushing a value below n adds log2(n) bits, and popping a value below n removes as many. The stack is
an asymmetric numeral system (Duda, 1311.2540) of the package `constriction`. Popping without a
previous push draws a uniform random value: this is how a codec draws noise. The bits that it
removes return when the decoder pushes the same value (bits-back coding).
"""

import math

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
WORD_BITS = 32
DIGIT_BITS = 10  # constriction loses little only for uniform values below about 2^10
PROBABILITY_BITS = 24  # of a probability of 0 or 1; a float32 holds its multiples exactly
STATE_WORDS = 4  # words near the top that the coder may have changed


class CodingError(Exception):
    """A batch that the codec cannot code, or a stream that it did not write."""


class BitStack:
    """A stack of bits that starts with random bits from a seeded generator.

    A codec borrows some of these bits before it pays them back. Only the words above the lowest
    point that it reached belong into a file, because a decoder can generate the others.

    Args:
        reserve: Number of random words that can be borrowed.
        borrowed: Random words that are replaced with `words`.
        words: Words of a file, little-endian, of 32 bits each.

    Attributes:
        lowest: Number of words that were never changed.

    Example:
        >>> stack = BitStack(reserve=100)
        >>> stack.push(np.array([3, 1]), np.array([10, 4]))
        >>> stack.pop(np.array([10, 4]))
        array([3, 1])
    """

    def __init__(
        self, reserve: int, borrowed: int = 0, words: NDArray[np.uint32] | None = None
    ) -> None:
        import constriction

        self._make_coder = constriction.stream.stack.AnsCoder
        self._uniform = constriction.stream.model.Uniform()
        self._bernoulli = constriction.stream.model.Bernoulli(perfect=False)
        self.reserve = _random_words(seed=0, count=reserve)
        self.reserve[-1] |= 1 << (WORD_BITS - 1)  # the coder needs a last word that is not zero
        if words is None:
            self.restore(self.reserve)
        else:
            if not len(words) or not words[-1] or borrowed > reserve:
                raise CodingError("the stream does not end as the coder writes it")
            self.restore(np.concatenate((self.reserve[: reserve - borrowed], words)))
        self.lowest = self._coder.num_words() - STATE_WORDS

    @property
    def num_bits(self) -> int:
        """The number of bits on the stack."""
        return int(self._coder.num_valid_bits())

    def save(self) -> NDArray[np.uint32]:
        """Return all words, for `restore`."""
        words: NDArray[np.uint32] = self._coder.get_compressed()
        return words

    def restore(self, words: NDArray[np.uint32]) -> None:
        """Return to the words of `save`."""
        self._coder = self._make_coder(words)

    def is_initial(self) -> bool:
        """Return whether all borrowed bits are back and nothing else is on the stack."""
        return bool(np.array_equal(self.save(), self.reserve))

    def to_words(self) -> tuple[int, NDArray[np.uint32]]:
        """Return the number of borrowed words, and the words that belong into a file."""
        start = max(0, min(self.lowest, len(self.reserve)))
        return len(self.reserve) - start, self.save()[start:]

    def scramble(self, count: int) -> None:
        """Add fixed random bits to the topmost words, modulo 2; a second call undoes this.

        The top of the stack holds the latents of the last images. Noise that is popped from it
        without scrambling would repeat them.
        """
        words = self.save()
        end = len(words) - STATE_WORDS
        start = max(0, end - count)
        words[start:end] ^= _random_words(seed=1, count=end - start)
        self.restore(words)
        self.lowest = min(self.lowest, start)

    def push(self, values: Integers, sizes: Integers) -> None:
        """Push values; each is at least 0 and below its size."""
        if sizes.size == 0:
            return
        if sizes.max() <= 1 << DIGIT_BITS:
            self._push_digits(values, sizes)
            return
        bits, groups = _digits(sizes)
        high = np.minimum(values >> bits, groups - 1)
        low = values - (high << bits)
        self.push(low, _low_sizes(sizes, bits, groups, high))
        self._push_digits(high, groups)

    def pop(self, sizes: Integers) -> Integers:
        """Pop values; each is uniform below its size."""
        if sizes.size == 0:
            return sizes
        if sizes.max() <= 1 << DIGIT_BITS:
            return self._pop_digits(sizes)
        bits, groups = _digits(sizes)
        high = self._pop_digits(groups)
        return (high << bits) + self.pop(_low_sizes(sizes, bits, groups, high))

    def push_bits(self, values: Integers, bits: Integers | int) -> None:
        """Push values; each is below 2^bits."""
        self.push(values, np.broadcast_to(np.left_shift(np.int64(1), bits), values.shape))

    def pop_bits(self, bits: Integers | int, count: int) -> Integers:
        """Pop `count` values below 2^bits."""
        return self.pop(np.broadcast_to(np.left_shift(np.int64(1), bits), (count,)))

    def push_binary(self, values: NDArray[np.generic], probability: NDArray[np.float32]) -> None:
        """Push values 0 or 1 with the probabilities of 1, multiples of 2^-PROBABILITY_BITS."""
        self._coder.encode_reverse(values.astype(np.int32), self._bernoulli, probability)

    def pop_binary(self, probability: NDArray[np.float32]) -> NDArray[np.int32]:
        """Pop values 0 or 1 with the probabilities of 1."""
        values: NDArray[np.int32] = self._coder.decode(self._bernoulli, probability)
        self._update_lowest()
        return values

    def _push_digits(self, values: Integers, sizes: Integers) -> None:
        varies = sizes > 1  # a value of size 1 is always 0 and takes no bits
        if not varies.all():
            values = values[varies]
            sizes = sizes[varies]
        if len(values):
            self._coder.encode_reverse(
                np.ascontiguousarray(values, np.int32),
                self._uniform,
                np.ascontiguousarray(sizes, np.int32),
            )

    def _pop_digits(self, sizes: Integers) -> Integers:
        varies = sizes > 1
        values = np.zeros(len(sizes), np.int64)
        if varies.all():
            values[:] = self._coder.decode(self._uniform, np.ascontiguousarray(sizes, np.int32))
        elif varies.any():
            values[varies] = self._coder.decode(
                self._uniform, np.ascontiguousarray(sizes[varies], np.int32)
            )
        self._update_lowest()
        return values

    def _update_lowest(self) -> None:
        self.lowest = min(self.lowest, self._coder.num_words() - STATE_WORDS)
        if self.lowest < 0:
            raise CodingError("the stack is empty")


def _random_words(seed: int, count: int) -> NDArray[np.uint32]:
    """Return random words. The raw output of a generator is the same in all versions of NumPy."""
    words: NDArray[np.uint32] = (np.random.PCG64(seed).random_raw(count) >> 32).astype(np.uint32)
    return words


def _digits(sizes: Integers) -> tuple[Integers, Integers]:
    """Return the low bits of each value, and the size of its high digit, about 2^DIGIT_BITS.

    The values below a size are divided into groups of 2^bits; the last group has between 1/2 and
    3/2 of that.
    """
    bits = np.maximum(np.frexp(sizes - 1.0)[1] - DIGIT_BITS, 0).astype(np.int64)
    half = (np.int64(1) << bits) >> 1
    return bits, np.maximum((sizes + half) >> bits, 1)


def _low_sizes(sizes: Integers, bits: Integers, groups: Integers, high: Integers) -> Integers:
    return np.where(high == groups - 1, sizes - (high << bits), np.int64(1) << bits)


def reserve_words(noise_bits: int) -> int:
    """Return a number of random words that no codec with this noise per image exhausts."""
    return 1024 + math.ceil(noise_bits / 5)
