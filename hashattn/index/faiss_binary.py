"""FaissBinary: FAISS's binary indexes, by factory string."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hashattn.core.checks import check_int
from hashattn.core.extras import require
from hashattn.index.base import Index, Spans, Store
from hashattn.index.faiss_store import FaissStore
from hashattn.ops.hamming.cpu import faiss as installed_faiss

_TEMPORARY = 64 << 20  # bytes of a GPU
GPU_LIMIT = 2048  # the largest k of FAISS's search on a GPU
_N = r"[1-9]\d{0,6}"
_KNOWN = re.compile(f"BFlat|BIVF{_N}(_HNSW({_N})?)?|BHNSW{_N}|BHash{_N}(x{_N})?")
_WORKS = '"BFlat", "BIVF64", "BHNSW32", "BHash16" and "BHash4x16" would work'
_FIELDS = {"nprobe": "BIVF", "ef_search": "BHNSW", "nflip": "BHash"}


def load_faiss() -> ModuleType:
    """FAISS; an ImportError that says how to install it where it is missing."""
    return installed_faiss() or require("faiss", "cpu", "FaissBinary")


@dataclass(frozen=True)
class FaissBinary(Index):
    """A binary index of FAISS (Douze et al. 2024, arXiv 2401.08281) for each row and KV head, over the packed codes.

    "BFlat" on a CPU is exact: it gives FlatHamming's distances, and the same keys with the same tie rule. The others
    only search: FAISS does not promise which of equally distant keys it returns, and slots stay empty where it finds
    too few. "BIVF*" is fitted to the first 39 keys a cell of each row (FAISS's k-means), and flat until they are there.
    The codes are kept a second time, in FAISS. Left padding is not indexed; queries that do not see the last keys ask
    FAISS for as many more. Appends are native; see remark() for the rest. A graph ("BHNSW*") depends on how keys were
    appended, the others do not.

    Args:
        factory: "BFlat", "BIVF{cells}", "BIVF{cells}_HNSW{links}", "BHNSW{links}", "BHash{bits}" (one table) or
            "BHash{tables}x{bits}", as faiss.index_binary_factory takes it.
        nprobe: cells that a query of "BIVF*" looks at; None for FAISS's 1.
        ef_search: candidates that a query of "BHNSW*" keeps (k if that is more); None for FAISS's 16.
        nflip: bits that a query of "BHash*" flips; None for FAISS's 0.
        device: "cpu", or "cuda" for GpuIndexBinaryFlat: "BFlat" only, k at most 2048, ties as FAISS has them;
            queries and results pass through the host.

    Raises:
        ValueError: an unknown factory string, a parameter that it does not take, or a GPU that is not there.
        ImportError: FAISS is missing.
    """

    factory: str = "BFlat"
    nprobe: int | None = None
    ef_search: int | None = None
    nflip: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.factory, str) or not _KNOWN.fullmatch(self.factory) or self.links == 1:
            raise ValueError(f"factory {self.factory!r} is none that FaissBinary serves; {_WORKS}")
        for name, kind in _FIELDS.items():
            value, least = getattr(self, name), 0 if name == "nflip" else 1
            if value is not None and not self.factory.startswith(kind):
                raise ValueError(f"{name}={value!r} is for {kind}*, but factory is {self.factory!r}; leave it out")
            if value is not None:
                object.__setattr__(self, name, check_int(name, value, least, 2**31 - 1))
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f'device must be "cpu" or "cuda", got {self.device!r}')
        library = load_faiss()
        if self.device == "cuda":
            if self.factory != "BFlat":
                raise ValueError(f'FAISS has "BFlat" on a GPU, not {self.factory!r}; device="cpu" would work')
            if not hasattr(library, "GpuIndexBinaryFlat") or library.get_num_gpus() == 0:
                raise ValueError(
                    f'device="cuda" needs a GPU and faiss-gpu, but FAISS {library.__version__} sees no GPU here; '
                    'device="cpu" would work'
                )

    @property
    def links(self) -> int:
        """M of an HNSW graph; 0 without one."""
        found = re.search(r"HNSW(\d+)", self.factory)
        return int(found[1]) if found else 0

    @property
    def needed(self) -> int:
        """Keys of a row that it is fitted to; 0 if it is not."""
        return 39 * int(re.findall(r"\d+", self.factory)[0]) if self.factory.startswith("BIVF") else 0

    @property
    def crops(self) -> bool:
        """Whether FAISS removes the last keys itself."""
        return self.device == "cpu" and self.factory.startswith(("BFlat", "BIVF"))

    @property
    def scans(self) -> bool:  # type: ignore[override]
        return self.factory == "BFlat" and self.device == "cpu"

    def accepts(self, code: str) -> bool:
        return code == "binary"

    def why_not(self, bits: int, query_bits: int, biased: bool) -> str | None:
        if biased:
            return "FAISS counts bits and adds no bias; bias_bits=0 or index=FlatHamming() would fit"
        if query_bits > 1 and not self.scans:
            return (
                'FAISS searches with one bit plane; query_bits=1, factory="BFlat" on a CPU or index=FlatHamming() '
                "would fit"
            )
        sizes = [int(size) for size in re.findall(r"\d+", self.factory)] if self.factory.startswith("BHash") else [0]
        hashed = sizes[0] * sizes[-1] if len(sizes) > 1 else sizes[0]
        return f"its tables take {hashed} bits, codes have {bits}; a smaller {_WORKS}" if hashed > bits else None

    def key_bytes(self, row: int) -> float:
        return 2 * row  # without lists and graphs

    def remark(self) -> str:
        crop = "crop native" if self.crops else "crop rebuilt from the codes"
        fit = f", fitted to the first {self.needed} keys of a row, flat until then" if self.needed else ""
        return f"appends native, {crop}, reorder native, repeated rows rebuilt{fit}"

    def new_store(self, capacity: int | None = None) -> Store:
        """An empty store.

        Raises:
            ValueError: a capacity that never holds the keys to fit it to.
        """
        capacity = None if capacity is None else check_int("capacity", capacity, 1)
        if capacity is not None and capacity < self.needed:
            raise ValueError(
                f"{self.factory!r} is fitted to {self.needed} keys (39 a cell), but capacity is {capacity}; "
                f'a capacity of {self.needed}, factory="BIVF{max(1, capacity // 39)}" or "BFlat" would work'
            )
        return FaissStore(Maker(self), self.needed, self.crops, capacity)

    def make(self, bits: int, fitted: bool, resources: Any = None) -> Any:
        """An empty index of FAISS for codes of so many bits; one that needs a fit is flat until fitted is True.

        resources: of the GPU that holds it; None on a CPU.
        """
        library = load_faiss()
        if resources is not None:
            index = library.GpuIndexBinaryFlat(resources, bits)
            index.resources = resources  # which live as long
            return index
        if self.needed and not fitted:
            return library.IndexBinaryFlat(bits)
        owner = library.index_binary_factory(bits, self.factory)
        index = library.downcast_IndexBinary(owner)
        index.owner = owner  # which frees it
        if self.nprobe is not None:
            index.nprobe = self.nprobe
        if self.ef_search is not None:
            index.hnsw.efSearch = self.ef_search
        if self.nflip is not None:
            index.nflip = self.nflip
        return index

    def distances(self, store: Store, query: Tensor, *, biased: bool = False, host: bool = False) -> Tensor:
        """int32 [B, Hq, T, N] from query codes int64 [B, Hq, T, W] or planes [B, Hq, T, b, W]; "BFlat" only."""
        if not self.scans:
            return super().distances(store, query, biased=biased, host=host)
        assert isinstance(store, FaissStore)
        planes = query.unsqueeze(3) if query.ndim == 4 else query
        found = store.scan(planes)  # [B, Hq, T, b, N]
        weights = 1 << torch.arange(planes.shape[3], dtype=torch.int32, device=found.device)
        return (found * weights.view(-1, 1)).sum(3, dtype=torch.int32)

    def search(self, store: Store, query: Tensor, k: int, spans: Spans) -> tuple[Tensor, Tensor]:
        """See :meth:`Index.search`; queries int64 [B, Hq, T, W].

        Raises:
            ValueError: on a GPU, more keys than FAISS finds there.
        """
        if self.scans:
            return super().search(store, query, k, spans)
        assert isinstance(store, FaissStore)
        slack = len(store) - min(end for row in spans for _, end in row)
        if self.device == "cuda" and k + slack > GPU_LIMIT:
            raise ValueError(
                f"FAISS finds at most {GPU_LIMIT} keys on a GPU, but k = {k} and {slack} hidden keys were asked for; "
                f'a smaller k, FaissBinary("BFlat", device="cpu") or FlatHamming() would work'
            )
        return store.search(query, k, spans)

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return f"FaissBinary({', '.join([repr(self.factory), *(f'{name}={value!r}' for name, value in given)])})"


@dataclass
class Maker:
    """Makes the indexes of a store; those on a GPU share memory, of which a copy of the store makes its own."""

    index: FaissBinary
    resources: Any = None

    def __call__(self, bits: int, fitted: bool) -> Any:
        if self.index.device == "cuda" and self.resources is None:
            self.resources = load_faiss().StandardGpuResources()
            self.resources.setTempMemory(_TEMPORARY)  # there is one for each layer: the default is more than a gigabyte
            self.resources.setPinnedMemory(0)
        return self.index.make(bits, fitted, self.resources)

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "resources": None}
