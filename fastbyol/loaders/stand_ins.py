"""Bad samples, which do not decode, and their stand-ins: the next sample of the file that does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.beton import BetonError, Reader
from fastbyol.loaders.batch import Batch, Packing, pack
from fastbyol.loaders.decode import decode_into, decode_to_tensor
from fastbyol.order import Rows

BadSamples = list[tuple[int, BetonError]]  # index and error of each


class StandIns:
    """The bad samples found so far and the stand-in of each.

    The stand-in is a function of the file alone, so an order of samples gives the same batches with every loader and
    number of ranks, and from wherever a run resumes. Not thread-safe.
    """

    def __init__(self, reader: Reader, *, on_error: str) -> None:
        self.reader = reader
        self._fails = on_error == "fail"
        self._stand_ins: dict[int, int] = {}

    def __len__(self) -> int:
        """Count the bad samples found so far."""
        return len(self._stand_ins)

    def find(self, index: int, error: BetonError) -> int:
        """Return the stand-in of a sample that failed with this error; raise the error where on_error is "fail"."""
        if self._fails:
            raise error
        if index not in self._stand_ins:
            self._stand_ins[index] = self._next_good(index, error)
        return self._stand_ins[index]

    def _next_good(self, index: int, error: BetonError) -> int:
        count = len(self.reader)
        for candidate in ((index + step) % count for step in range(1, count)):
            if self.decodes(candidate):
                return candidate
        raise BetonError(
            f"{self.reader.path}: no sample decodes (the first error: {error}); write the file anew with fastbyol-prep"
        ) from error

    def decodes(self, index: int) -> bool:
        """Tell whether a sample decodes to the size in its record."""
        size = int(self.reader.heights[index] * self.reader.widths[index] * 3)
        try:
            decode_into(np.empty(size, np.uint8), self.reader, index)
        except BetonError:
            return False
        return True

    def substitute(self, rows: Rows) -> tuple[Rows, NDArray[np.int64]]:
        """Return the rows with the known bad samples replaced, and the bad samples."""
        if not self._stand_ins:
            return rows, rows.indices[:0]
        indices = np.array([self._stand_ins.get(index, index) for index in rows.indices.tolist()], np.int64)
        return Rows(indices, rows.epochs), rows.indices[indices != rows.indices]

    def make_batch(
        self,
        packing: Packing,
        pixels: Tensor,
        bad: BadSamples,
        *,
        empty: Callable[[Packing], Tensor],
        skipped: NDArray[np.int64],
    ) -> Batch:
        """Make a Batch of a filled buffer or, where it has bad samples, of a new buffer with their stand-ins.

        empty: allocates the new buffer; skipped: the samples that were replaced before the batch was decoded.
        """
        if not bad:
            return packing.batch(self.reader, pixels, skipped=skipped)
        for index, error in bad:
            self.find(index, error)
        rows, newly_skipped = self.substitute(packing.rows)
        repaired = pack(self.reader, rows)
        out = empty(repaired)
        for place, (index, begin, end) in enumerate(repaired.places()):
            if index == packing.rows.indices[place]:
                out[begin:end] = pixels[packing.begins[place] : packing.ends[place]]
            else:
                decode_to_tensor(out[begin:end], self.reader, index)
        return repaired.batch(self.reader, out, skipped=np.concatenate([skipped, newly_skipped]))
