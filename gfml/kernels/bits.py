"""Bitmaps of pairs."""

from gfml.base.compiled import compiled


@compiled
def set_bits(indptr, indices, width, bits):
    """Set bit row * width + column of ``bits`` uint8 [n], the lowest of a byte first, for every entry of a CSR matrix."""
    for row in range(len(indptr) - 1):
        for place in range(indptr[row], indptr[row + 1]):
            cell = row * width + indices[place]
            bits[cell >> 3] |= 1 << (cell & 7)
