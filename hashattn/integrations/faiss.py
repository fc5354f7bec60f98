"""Codes to and from FAISS's files of binary indexes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hashattn.cache import KVCache
from hashattn.files import replacing
from hashattn.index.faiss_binary import load_faiss
from hashattn.naming import short
from hashattn.ops.hamming.cpu import as_bytes


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
    try:
        owner = faiss.read_index_binary(str(path))
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} is no binary index of FAISS: {error}") from error
    index = faiss.downcast_IndexBinary(owner)
    if not isinstance(index, faiss.IndexBinaryFlat) or index.d % 64:
        raise ValueError(
            f"{str(path)!r} holds an {type(index).__name__} of {index.d} bits; an IndexBinaryFlat of a multiple of 64 "
            "bits, such as export_codes() writes, would work"
        )
    octets = faiss.vector_to_array(index.xb).reshape(index.ntotal, -1)
    return torch.from_numpy(octets).view(torch.int64)
