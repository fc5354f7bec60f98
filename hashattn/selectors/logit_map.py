"""LogitMap: what a distance says about a logit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.core.extras import require

if TYPE_CHECKING:
    from hashattn.encoders import Encoder
    from hashattn.index import Index


@dataclass(frozen=True)
class LogitMap:
    """A falling piecewise linear map from distances to logits, up to a constant that softmax ignores.

    Beyond its knots it is constant. It knows nothing of a single query, whose norm makes its logits flat or peaked: it
    gives the mean attention weight of keys at a distance, in the text that it was fitted to.

    Args:
        distances: of the knots, rising, in the index's units.
        logits: at the knots, falling or level.

    Raises:
        ValueError: knots of other orders or numbers.
    """

    distances: tuple[float, ...]
    logits: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.distances or len(self.distances) != len(self.logits):
            raise ValueError(
                f"distances and logits must be equally many knots, at least one, got {len(self.distances)} and "
                f"{len(self.logits)}"
            )
        if not all(math.isfinite(x) for x in (*self.distances, *self.logits)):
            raise ValueError(f"distances and logits must be finite numbers, got {self.distances!r} and {self.logits!r}")
        for name, xs in (("rise", self.distances), ("fall", tuple(-y for y in self.logits))):
            if any(not a <= b for a, b in zip(xs, (*xs[1:], xs[-1]), strict=True)):
                what = "distances" if name == "rise" else "logits"
                raise ValueError(f"{what} of the knots must {name} or be level, got {getattr(self, what)!r}")

    def __call__(self, distances: Tensor) -> Tensor:
        """Logits, float32 of the shape of distances."""
        x = torch.tensor(self.distances, device=distances.device)
        y = torch.tensor(self.logits, device=distances.device)
        d = distances.float().contiguous()
        right = torch.bucketize(d, x).clamp(1, max(1, len(x) - 1)).clamp(max=len(x) - 1)
        left = (right - 1).clamp(min=0)
        part = ((d - x[left]) / (x[right] - x[left]).clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
        return y[left] + part * (y[right] - y[left])

    @staticmethod
    def fit(
        q: Tensor, k: Tensor, encoder: Encoder, index: Index, *, scale: float | None = None, knots: int = 64
    ) -> LogitMap:
        """Isotonic regression of attention weights on distances (scipy); every query sees every key.

        The mean weight at a distance is what a sum of weights needs. Its logarithm is the logit.

        Args:
            q, k: queries [B, Hq, T, D] and keys [B, Hkv, N, D] of one layer or several, post-RoPE.
            encoder: fitted, if it is to be.
            index: that tells distances.
            scale: of the logits, 1 / sqrt(D) by default.
            knots: at most this many, each the mean of equally many keys at neighbouring distances.
        """
        isotonic = require("scipy.optimize", "fit", "LogitMap.fit").isotonic_regression
        with torch.no_grad():
            centre, centring = None, encoder.centring
            if centring is not None:
                centre = centring.centre_of(k)
            store = index.new_store()
            store.add(encoder.encode_key(k, centre))
            distances = index.distances(store, encoder.encode_query(q), biased=encoder.biased)
            grouped = q.float().unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, T, D]
            logits = (grouped @ k.float().unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
            weights = torch.softmax(logits * (q.shape[-1] ** -0.5 if scale is None else scale), -1) * k.shape[2]
        x = distances.double().flatten().cpu()
        edges = x.sort().values[torch.arange(knots) * len(x) // knots].unique()
        place = torch.searchsorted(edges, x, right=True) - 1  # equal distances share a knot
        count = torch.bincount(place).double()

        def mean(values: Tensor) -> Tensor:
            return torch.zeros_like(count).index_add_(0, place, values) / count

        y = isotonic(mean(weights.double().flatten().cpu()).numpy(), weights=count.numpy(), increasing=False).x
        return LogitMap(tuple(mean(x).tolist()), tuple(torch.from_numpy(y.copy()).clamp(min=1e-30).log().tolist()))
