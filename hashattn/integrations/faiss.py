"""Codes to and from FAISS's files of binary indexes."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from hashattn.cache.kv_cache import KVCache
from hashattn.core.files import replacing
from hashattn.core.naming import short
from hashattn.index.faiss_binary import load_faiss
from hashattn.ops.hamming.cpu import as_bytes

# A file of an IndexBinaryFlat: kind, bits, bytes a vector, vectors, whether trained, metric, and how many bytes follow.
_HEADER = struct.Struct("<4siiq?iQ")
_OTHERS = {
    "IBwF": "IndexBinaryIVF",
    "IBHf": "IndexBinaryHNSW",
    "IBHc": "IndexBinaryHNSWCagra",
    "IBMp": "IndexBinaryIDMap",
    "IBM2": "IndexBinaryIDMap2",
    "IBFf": "IndexBinaryFromFloat",
    "IBHh": "IndexBinaryHash",
    "IBHm": "IndexBinaryMultiHash",
}
_WANTED = "an IndexBinaryFlat of a multiple of 64 bits, such as export_codes() writes, would work"


def export_codes(cache: KVCache, path: str | Path, *, row: int = 0, head: int = 0) -> Path:
    """Write the codes of a row and head as an IndexBinaryFlat, with faiss.write_index_binary.

    Its vector i is the row's visible key i; its dimension is 64 bits for each word of a code. The file is there whole
    or not at all.

    Args:
        cache: with binary codes.
        path: of the file; what was there is replaced.
        row, head: which codes: a batch row and a head of cache.codes.

    Returns:
        the path.

    Raises:
        ValueError: a row or head that is not there, or codes that are not binary.
    """
    faiss, path = load_faiss(), Path(path)
    if cache.encoder is None or cache.encoder.code != "binary":
        raise ValueError(f"cache must hold binary codes, its encoder is {short(cache.encoder)}; SimHash() makes some")
    codes = cache.codes
    for name, value, size in (("row", row, codes.shape[0]), ("head", head, codes.shape[1])):
        if not 0 <= value < size:
            raise ValueError(f"{name} must be from 0 to {size - 1}, got {value!r}")
    if not cache.ready[row]:
        raise ValueError(f"row {row} holds fewer than {cache.warmup} keys, so it has no codes yet")
    index = faiss.IndexBinaryFlat(64 * codes.shape[-1])
    index.add(as_bytes(codes[row, head, int(cache.start[row]) :].cpu().contiguous()))
    with replacing(path) as scratch:
        faiss.write_index_binary(index, str(scratch))
    return path


def import_codes(path: str | Path) -> Tensor:
    """Read the codes of an IndexBinaryFlat, with faiss.read_index_binary: int64 [N, W], as encoders pack them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of FAISS, holds another index, or its vectors are no whole words of 64 bits.
    """
    faiss, path = load_faiss(), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file")
    _check_header(path)
    try:
        owner = faiss.read_index_binary(str(path))
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{str(path)!r} is no binary index of FAISS: {error}") from error
    index = faiss.downcast_IndexBinary(owner)  # which keeps what it shows
    octets = faiss.vector_to_array(index.xb).reshape(index.ntotal, index.d // 8)
    return torch.from_numpy(octets).view(torch.int64)


def _check_header(path: Path) -> None:
    """Raise ValueError unless a file begins as an IndexBinaryFlat does and is as long as it says: FAISS believes it."""
    with path.open("rb") as file:
        start, size = file.read(_HEADER.size), file.seek(0, 2)
    kind = start[:4].decode("latin-1")
    if len(start) >= 4 and kind in _OTHERS:
        raise ValueError(f"{str(path)!r} holds an {_OTHERS[kind]}; {_WANTED}")
    if len(start) < _HEADER.size or kind != "IBxF":
        raise ValueError(
            f"{str(path)!r} is no binary index of FAISS, or cut short: it begins with {start[:4]!r}; {_WANTED}"
        )
    _, bits, code_bytes, count, _, _, held = _HEADER.unpack(start)
    if not 0 < bits <= 1 << 20 or bits % 64:
        raise ValueError(f"{str(path)!r} holds an IndexBinaryFlat of {bits} bits; {_WANTED}")
    if code_bytes * 8 != bits or count < 0 or held != count * code_bytes or size != _HEADER.size + held:
        raise ValueError(
            f"{str(path)!r} is no binary index of FAISS, or cut short: it has {size:,} bytes for {count:,} vectors of "
            f"{bits} bits"
        )
