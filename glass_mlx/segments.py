"""Sums over segments of rows, such as the tokens of each expert."""

import mlx.core as mx


class Segments:
    """Segments of R rows. Nothing that is made here is larger than the rows or the sums.

    Args:
        numbers: (R,) the segment of each row.
        count: the number of segments.
        is_sorted: whether to sort the rows. Without that they are added one by one, which is faster
            for the few rows of one token. A GPU adds them in any order, so no two of these rows
            should be in one segment: sums could differ in their last bits from run to run.
    """

    def __init__(self, numbers: mx.array, count: int, is_sorted: bool = True) -> None:
        self._numbers, self._count = numbers, count
        self._order: mx.array | None = None
        if is_sorted and not mx.cuda.is_available():  # CUDA has no segmented product
            self._order = mx.argsort(numbers)
            sizes = mx.zeros((count,), mx.uint32).at[numbers].add(mx.ones_like(numbers, mx.uint32))
            stops = mx.cumsum(sizes)
            self._bounds = mx.stack([stops - sizes, stops], axis=-1).astype(mx.uint32)

    def ordered(self, rows: mx.array) -> mx.array:
        """Return rows (R, ...) in the order in which `add` takes them."""
        return rows if self._order is None else rows[self._order]

    def add(self, total: mx.array, factors: mx.array, vectors: mx.array) -> mx.array:
        """Add each segment's sum of factors times vectors to a total.

        Args:
            total: (..., n) with one vector per segment.
            factors: (R,) factors, ordered.
            vectors: (R, n) vectors, ordered.
        """
        flat = total.reshape(self._count, -1)
        if self._order is None:
            flat = flat.at[self._numbers].add(factors[:, None] * vectors)
        else:
            flat = flat + mx.segmented_mm(factors[None], vectors, self._bounds).squeeze(1)
        return flat.reshape(total.shape)
