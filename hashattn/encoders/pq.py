"""PQ: product quantisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hashattn.core.checks import check_fit, check_int, check_seed
from hashattn.core.extras import require
from hashattn.core.lasting import lasting
from hashattn.encoders.base import Encoder
from hashattn.encoders.fitted import part_of_heads

_BLOCK = 8192  # keys whose distances to all centroids are held at a time


class PQ(nn.Module, Encoder):
    """Product quantisation (Jégou et al., TPAMI 2011), fitted to keys by FAISS's k-means; PQCache (arXiv 2407.12820).

    A key is cut into sub-vectors, and each is replaced by the number of the nearest of 2^sub_bits centroids: one byte
    a sub-quantiser, whatever sub_bits is. Queries stay as they are and become tables of their products with the
    centroids (asymmetric distance computation). The error of an estimated product is at most |q| |k - decode(code)|.

    Args:
        subquantisers: m, which divides head_dim. 8 to 16 serve attention; PQCache takes 2.
        sub_bits: 4 to 8; PQCache takes 6.
        shared: one set of codebooks for all KV heads; otherwise one for each.
        iterations: of k-means.
        seed: of its start.
    """

    code = "pq"

    @lasting
    def __init__(
        self, subquantisers: int = 16, *, sub_bits: int = 8, shared: bool = False, iterations: int = 25, seed: int = 0
    ) -> None:
        super().__init__()
        self.subquantisers = check_int("subquantisers", subquantisers, 1)
        self.sub_bits, self.shared = check_int("sub_bits", sub_bits, 4, 8), shared
        self.iterations, self.seed = check_int("iterations", iterations, 1), check_seed(seed)
        self.bits = self.subquantisers * self.sub_bits
        self.codebooks: Tensor
        self.register_buffer("codebooks", torch.empty(0))  # [Hkv or 1, m, 2^sub_bits, D / m]

    @property
    def fitted(self) -> bool:
        return self.codebooks.numel() > 0

    def code_bytes(self, head_dim: int, itemsize: int) -> int:
        return self.subquantisers

    def query_shape(self, head_dim: int) -> tuple[int, int]:
        return self.subquantisers, 1 << self.sub_bits

    @lasting
    def fit(self, q: Tensor | None, k: Tensor) -> PQ:
        """Fit to keys [B, Hkv, N, D]; queries play no part. Needs FAISS. Returns itself.

        Raises:
            TypeError, ValueError: keys that check_fit() refuses, a head_dim that subquantisers does not divide, or
                fewer keys than centroids.
        """
        faiss = require("faiss", "cpu", "PQ.fit")
        check_fit(k=k)
        self._check_dim(k.shape[-1])
        keys = k.detach().float().cpu().transpose(0, 1).flatten(1, 2)  # [Hkv, B*N, D]
        if self.shared:
            keys = keys.flatten(0, 1).unsqueeze(0)
        centroids = 1 << self.sub_bits
        if keys.shape[1] < centroids:
            raise ValueError(
                f"k must hold at least {centroids} keys a head to fit {centroids} centroids, got {keys.shape[1]}; "
                "more keys, fewer sub_bits or shared=True would do"
            )
        books = []
        for part in keys.unflatten(-1, (self.subquantisers, -1)).transpose(1, 2).flatten(0, 1):  # [B*N, D / m] each
            kmeans = faiss.Kmeans(
                part.shape[-1], centroids, niter=self.iterations, seed=self.seed, min_points_per_centroid=1
            )
            kmeans.train(part.contiguous().numpy())
            books.append(torch.from_numpy(kmeans.centroids.copy()))
        self.codebooks = torch.stack(books).unflatten(0, (-1, self.subquantisers)).to(k.device)
        self.fits += 1
        return self

    def prepare(self, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self._check_dim(head_dim)
        shape = 1 if self.shared else kv_heads, self.subquantisers, 1 << self.sub_bits, head_dim // self.subquantisers
        self.codebooks = torch.empty(shape, device=device)

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        self._check_dim(head_dim)
        if not self.fitted:
            return
        wanted = (
            1 if self.shared else kv_heads,
            self.subquantisers,
            1 << self.sub_bits,
            head_dim // self.subquantisers,
        )
        if self.codebooks.shape != wanted:
            raise ValueError(
                f"this PQ has codebooks {[*self.codebooks.shape]}, but {kv_heads} KV heads of head_dim {head_dim} need "
                f"{[*wanted]}"
            )

    def for_heads(self, first: int, count: int) -> PQ:
        self.check_fitted()
        return self if self.shared else part_of_heads(self, len(self.codebooks), first, count, {"codebooks": 1})

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        """Numbers of the nearest centroids, uint8 [B, Hkv, N, m]."""
        self.check_fitted()
        sizes = self.codebooks.square().sum(-1).unsqueeze(2)  # [H, m, 1, C]
        codes = []
        for block in k.split(_BLOCK, 2):
            parts = block.float().unflatten(-1, (self.subquantisers, -1)).transpose(2, 3)  # [B, Hkv, m, n, D / m]
            far = sizes - 2 * (parts @ self.codebooks.transpose(-1, -2))
            codes.append(far.argmin(-1).to(torch.uint8).transpose(2, 3))
        return torch.cat(codes, 2)

    def encode_query(self, q: Tensor) -> Tensor:
        """Negated products with every centroid, float32 [B, Hq, T, m, 2^sub_bits]."""
        self.check_fitted()
        heads = len(self.codebooks)
        parts = q.float().reshape(q.shape[0], heads, -1, self.subquantisers, q.shape[-1] // self.subquantisers)
        tables = -(parts.transpose(2, 3) @ self.codebooks.transpose(-1, -2))  # [B, H, m, G*T, C]
        return tables.transpose(2, 3).reshape(*q.shape[:3], self.subquantisers, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """The keys that codes [B, Hkv, N, m] stand for, float32 [B, Hkv, N, D]."""
        self.check_fitted()
        heads, m = torch.arange(codes.shape[1]) % len(self.codebooks), torch.arange(self.subquantisers)
        device = self.codebooks.device
        return self.codebooks[heads.to(device)[:, None, None], m.to(device), codes.long()].flatten(-2)

    def _check_dim(self, head_dim: int) -> None:
        if head_dim % self.subquantisers:
            raise ValueError(
                f"subquantisers must divide head_dim, got {self.subquantisers} and {head_dim}; "
                f"{next(m for m in range(self.subquantisers, 0, -1) if head_dim % m == 0)} would fit"
            )

    @lasting
    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        if prefix + "codebooks" in state_dict:  # their shape is known only once fitted
            self.codebooks = torch.empty_like(state_dict[prefix + "codebooks"], device=self.codebooks.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.fits += 1

    def extra_repr(self) -> str:
        return f"subquantisers={self.subquantisers}, sub_bits={self.sub_bits}, fitted={self.fitted}"
