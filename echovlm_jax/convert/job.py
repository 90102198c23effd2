"""What a conversion makes, chunk by chunk: as it is in the source, in another dtype, or rounded to
few bits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from echovlm_jax.convert import few_bits, folder, table
from echovlm_jax.convert import source as sources
from echovlm_jax.convert.peft import Adapter
from echovlm_jax.model import ParamSpec
from echovlm_jax.quantize import takes
from echovlm_jax.storage import writer as store
from echovlm_jax.storage.arrays import piece_shape


class Piece(NamedTuple):
    """Values that are stored as one chunk: their tensor, their place, and whether they are the
    tensor's last."""

    name: str
    array: str
    index: tuple[int | slice, ...]
    values: np.ndarray
    last: bool


@dataclass(frozen=True)
class Conversion:
    """What a folder of ours is made of.

    Attributes:
      source: the tensors.
      slots: the table of the model to make, by released name.
      match: the source's tensor for each slot.
      dtypes: of each parameter, by path; of a quantized one before it is.
      specs: of each parameter, by path.
      identity: in JSON's types; work that was begun is gone on with only where it is equal.
      config: the content of config.json; the source's own by default.
      adapter: what is merged into the tensors.
      quantized: the form of the parameters that are quantized.
    """

    source: sources.Source
    slots: dict[str, table.Slot]
    match: table.Match
    dtypes: dict[str, np.dtype]
    specs: dict[str, ParamSpec]
    identity: dict[str, Any]
    config: Mapping[str, Any] | None = None
    adapter: Adapter | None = None
    quantized: few_bits.FewBits | None = None

    def arrays(self) -> dict[str, few_bits.Stored]:
        """What is stored, by name."""
        out: dict[str, few_bits.Stored] = {}
        for slot in self.slots.values():
            out |= self._arrays(slot.path)
        return out

    def _arrays(self, path: str) -> dict[str, few_bits.Stored]:
        spec, dtype = self.specs[path], self.dtypes[path]
        if form := self.form(path):
            return form.arrays(path, spec)
        lead, part = spec.shape[: spec.stacked], spec.shape[spec.stacked :]
        chunk = (1,) * spec.stacked + store.chunk_shape(part, dtype.itemsize)
        return {path: (lead + part, dtype, chunk)}

    def form(self, path: str) -> few_bits.FewBits | None:
        """The form of a parameter that is quantized."""
        return self.quantized if takes(path, self.specs[path]) else None

    def parts(self, name: str) -> list[few_bits.Part]:
        """The chunks of a tensor, in order: each one's array and place."""
        slot = self.slots[name]
        if form := self.form(slot.path):
            return form.parts(slot.path, self.specs[slot.path], slot.index)
        cuts = store.pieces(slot.part, self.dtypes[slot.path].itemsize)
        return [(slot.path, (*slot.index, *cut)) for cut in cuts]

    def nbytes(self, name: str) -> int:
        """What is stored of a tensor."""
        slot = self.slots[name]
        places = int(np.prod(self.specs[slot.path].shape[: len(slot.index)], dtype=np.int64))
        arrays = self._arrays(slot.path).values()
        return sum(int(np.prod(shape)) * dtype.itemsize // places for shape, dtype, _ in arrays)

    def pieces(self, done: set[str]) -> Iterator[Piece]:
        """What is to be stored, in the order of the source's files.

        Args:
          done: names of tensors to leave out.

        Raises:
          InputError: the source can't be read, or holds what can't be stored so.
        """
        tensors = self.source.tensors
        names = [name for name in self.slots if name not in done]
        for name in sorted(names, key=lambda name: tensors[self.match.found[name]].order):
            parts = self.parts(name)
            form = self.form(self.slots[name].path)
            found = self._rounded(name, form) if form else self._as_they_are(name, parts)
            for number, ((array, index), values) in enumerate(zip(parts, found, strict=True), 1):
                yield Piece(name, array, index, values, number == len(parts))

    def _as_they_are(self, name: str, parts: list[few_bits.Part]) -> Iterator[np.ndarray]:
        slot, start = self.slots[name], 0
        for _, index in parts:
            shape = piece_shape(index[len(slot.index) :])  # type: ignore[arg-type]
            stop = start + int(np.prod(shape))
            values = self._read(name, start, stop)
            yield folder.cast(values, self.dtypes[slot.path], name).reshape(shape)
            start = stop

    def _rounded(self, name: str, form: few_bits.FewBits) -> Iterator[np.ndarray]:
        """The chunks of values, then all scales."""
        slot = self.slots[name]
        spec, scales = self.specs[slot.path], []
        row = slot.size // slot.part[0]
        for cut in form.cuts(spec):
            rows = self._read(name, cut.start * row, cut.stop * row)
            rows = rows.reshape(-1, *slot.part[1:])
            values, scale = few_bits.rounded(rows, spec, form.how, packed=True, name=name)
            scales.append(scale)
            yield values
        yield np.concatenate(scales, few_bits.scale_axis(spec, form.how))

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        """A tensor's values [start, stop), counted flat, with the adapter's."""
        values = self.source.tensors[self.match.found[name]].read(start, stop)
        if self.adapter is None:
            return values
        slot = self.slots[name]
        return self.adapter.merged(name, values, start, slot.size // slot.shape[0])
