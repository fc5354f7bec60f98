"""MixedPrecision: exact logits for critical keys, logits from codes for medium ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hashattn.attend.base import Attend, Keys, on_host
from hashattn.attend.estimate_samples import EstimateSamples, nearest_of
from hashattn.core.checks import check_fit, check_int, check_number
from hashattn.core.kinds import MakesCodes
from hashattn.core.lasting import lasting
from hashattn.core.naming import short
from hashattn.core.types import MEDIUM, Output, Selection
from hashattn.index.view import View
from hashattn.ops import attend as ops
from hashattn.ops.decode import Estimate, Residual
from hashattn.ops.hamming import differing, unpack_bits


class CodeResidual(nn.Module):
    """A small MLP of (h_q, h_k), sign vectors in +-1, that starts at zero."""

    @lasting
    def __init__(self, bits: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(bits, hidden)
        self.key = nn.Linear(bits, hidden, bias=False)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h_q: Tensor, h_k: Tensor) -> Tensor:
        """[..., 1, bits] and [..., K, bits] -> [..., K]."""
        return self.out(torch.relu(self.query(h_q) + self.key(h_k))).squeeze(-1)


class MixedPrecision(nn.Module, Attend):
    """Dynamic mixed precision of DASH-KV (arXiv 2604.19351).

    A critical key has its exact logit q.k * scale. A medium key's is estimated without reading the key, on the same
    scale, so that both meet in one softmax:

        scale * (q.c + a |q| |k - c| (<h_q, h_k> / bits + residual(h_q, h_k)))

    with c the row's centre and |k - c| kept by the cache in bfloat16. Its value takes part in full. For random planes
    <h_q, h_k> / bits is 1 - 2 angle / pi, about 2 / pi cos(angle) near a right angle, which asks for a = pi / 2; but
    keys are medium because their codes agree by more than they should, and 0.8 has the smallest error on real keys
    (128 bits). fit() fits a and the residual, which costs nothing until then. h_q are a multi-bit query's signs.

    Args:
        hidden: width of the residual's hidden layer; 0 for no residual.
        a: start of the scale of the estimate.
    """

    needs_norms = True
    code = "binary"

    @lasting
    def __init__(self, *, hidden: int = 32, a: float = 0.8) -> None:
        super().__init__()
        self.hidden = check_int("hidden", hidden, 0)
        self.a = nn.Parameter(torch.tensor(check_number("a", a)))
        self.residual: CodeResidual | None = None

    def attend(
        self,
        q: Tensor,
        cache: Keys,
        selection: Selection | None,
        scale: float,
        *,
        view: View | None = None,
        need_lse: bool = False,
        need_weights: bool = False,
    ) -> Output:
        if selection is None:
            raise ValueError("MixedPrecision needs a selection; DenseAttend does without")
        ids, tier = selection.ids, selection.tier
        keys, values, at = cache.selected(ids)
        host = on_host(view, selection, q, keys, values, *self.parameters())
        if tier is None:
            logits = ops.logits(q, keys, at, scale, host=host)
        else:
            if view is None or view.query is None:
                raise ValueError("MixedPrecision needs the view of the encoded queries for a selection with tiers")
            few = ids.shape[-1] if selection.critical_slots is None else selection.critical_slots
            exact_ids, medium = at[..., :few], tier == MEDIUM
            mixed = not host or bool(medium[..., :few].any())  # where asking costs nothing
            if mixed:
                exact_ids = exact_ids.masked_fill(medium[..., :few], -1)  # medium keys are not read
            exact = ops.logits(q, keys, exact_ids.contiguous(), scale, host=host)
            if mixed:
                exact = F.pad(exact, (0, ids.shape[-1] - few))
                logits = torch.where(medium.unsqueeze(3), self.estimate(q, cache, ids, view) * scale, exact)
            elif few < ids.shape[-1]:
                logits = torch.cat([exact, self.estimate(q, cache, ids[..., few:].contiguous(), view) * scale], dim=-1)
            else:
                logits = exact
        return Output(
            *ops.weigh(
                logits,
                values,
                at,
                q.dtype,
                log_weights=selection.log_weights,
                need_lse=need_lse,
                need_weights=need_weights,
                host=host,
            )
        )

    @property
    def fused(self) -> bool:
        return self.residual is None

    @property
    def compiled(self) -> bool:
        return True

    def fused_estimate(self, cache: Keys) -> Estimate:
        norms = cache.storage("norms")
        a = self.a.detach().view(1)
        if a.device != norms.device:  # a number that is not a weight on the device is filled in there: no copy
            a = torch.full((1,), a.item(), device=norms.device)
        return Estimate(norms, cache.centre.float().contiguous(), a, cache.bits, self._fused_residual())

    def learned(self) -> tuple[object, ...]:
        return self.residual, self.a.data_ptr()  # whose numbers a step reads anew

    def _fused_residual(self) -> Residual | None:
        if self.residual is None:
            return None
        query, key, out = self.residual.query, self.residual.key, self.residual.out
        return Residual(
            *(w.detach().float().contiguous() for w in (query.weight, query.bias, key.weight, out.weight[0], out.bias))
        )

    @lasting
    def fit(
        self,
        q: Tensor,
        k: Tensor,
        encoder: MakesCodes,
        *,
        positions: Tensor | None = None,
        critical: float = 0.05,
        share: float = 0.1,
        scale: float | None = None,
        steps: int = 200,
        queries: int = 8,
    ) -> MixedPrecision:
        """Fit a and the residual, so that softmax weights over critical and medium keys change least. Returns itself.

        What is minimised is KL(true || mixed) over the nearest keys of each query: a few logits that are estimated
        too high cost more than many that are a little off, which least squares does not see. a is fitted alone, then
        with the residual, which is kept only where it helps every fourth query, which nothing is fitted to.

        Args:
            q, k: queries [B, Hq, T, D] and keys [B, Hkv, N, D] of one layer, post-RoPE.
            encoder: a binary encoder; fitted, if it is to be.
            positions: int64 [B, T], the last column that each query sees; the last T ones by default.
            critical, share: of the keys that a query sees: the nearest, which stay exact, and those with medium ones.
            scale: of the logits, 1 / sqrt(D) by default.
            steps: of Adam, for a and again for the residual.
            queries: drawn at each step.

        Raises:
            TypeError, ValueError: what check_fit() refuses, an encoder without binary codes, or shares that
                leave no medium keys.
        """
        check_fit(q=q, k=k)
        if encoder.code != "binary":
            raise ValueError(f"encoder must make binary codes, got {short(encoder)}")
        if not encoder.angular:
            raise ValueError(
                f"encoder must make codes whose distances tell angles, as SimHash's do, got {short(encoder)}"
            )
        if not 0 < critical < share <= 1:
            raise ValueError(f"critical and share must be 0 < critical < share <= 1, got {critical} and {share}")
        batch = nearest_of(q, k, encoder, positions, critical, share, q.shape[-1] ** -0.5 if scale is None else scale)
        every = torch.arange(q.shape[2], device=q.device)
        own, held = every[(every + 1) % 4 != 0], every[3::4]
        self.residual = None
        self._minimise(batch, own, [self.a], steps, queries, lr=2e-2)
        if self.hidden and len(held):
            alone, without = self.a.detach().clone(), self._divergence(batch, held)
            self.residual = CodeResidual(encoder.bits, self.hidden).to(k.device)
            self._minimise(batch, own, [*self.parameters()], steps, queries, lr=3e-3)
            if not self._divergence(batch, held) < without:
                self.residual = None
                self.a.data.copy_(alone)
        return self

    @torch.enable_grad()
    def _minimise(
        self, batch: EstimateSamples, own: Tensor, parameters: list[nn.Parameter], steps: int, queries: int, lr: float
    ) -> None:
        optimiser = torch.optim.Adam(parameters, lr=lr)
        for i in range(steps):
            drawn = own[torch.randint(0, len(own), (queries,)).to(own.device)]
            loss = self._loss(batch.part(i % len(batch.true), drawn))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    @torch.no_grad()
    def _divergence(self, batch: EstimateSamples, queries: Tensor) -> float:
        return sum(float(self._loss(batch.part(i, queries))) for i in range(len(batch.true)))

    def _loss(self, part: EstimateSamples) -> Tensor:
        """The mean KL of the weights with estimated medium keys from the true ones, both over the same keys."""
        near = part.agreement
        if self.residual is not None:
            near = near + self.residual(part.h_q.unsqueeze(-2), unpack_bits(part.codes, part.bits).float() * 2 - 1)
        mixed = torch.where(part.medium, part.offset + self.a * part.size * near, part.true)
        true = part.true.log_softmax(-1)
        terms = true.exp() * (true - mixed.masked_fill(~part.seen, -torch.inf).log_softmax(-1))
        return terms.masked_fill(~part.seen, 0).sum(-1).mean()

    def estimate(self, q: Tensor, cache: Keys, ids: Tensor, view: View) -> Tensor:
        """Estimated q.k of the keys at ids [B, H, T, K], from codes and norms alone: float32 [B, H, T, G, K]."""
        heads, bits = ids.shape[1], cache.bits
        agreement = 1 - 2 * self._disagreements(cache, ids, view).float() / bits
        if self.residual is not None:
            h_q, h_k = self._codes(cache, ids, view)
            agreement = agreement + self.residual(
                unpack_bits(h_q, bits).float().unsqueeze(-2) * 2 - 1, unpack_bits(h_k, bits).float() * 2 - 1
            )
        grouped = q.float().unflatten(1, (heads, -1)).transpose(2, 3)  # [B, H, T, G, D]
        norms = cache.gather("norms", ids).float().squeeze(-1).unsqueeze(3)  # [B, H, T, 1, K]
        centre = cache.centre.repeat_interleave(heads // cache.centre.shape[1], dim=1)  # [B, H, D]
        offset = grouped @ centre[:, :, None, :, None]  # [B, H, T, G, 1]
        return offset + self.a * grouped.norm(dim=-1, keepdim=True) * norms * agreement

    def _disagreements(self, cache: Keys, ids: Tensor, view: View) -> Tensor:
        """Hamming distances of the sign planes at ids: integers [B, H, T, G, K]."""
        assert view.query is not None
        if view.query.ndim == 4 and view.scanned:  # one plane: the scan has them already
            group = view.q_heads // ids.shape[1]
            columns = ids.clamp(min=0).long().repeat_interleave(group, dim=1)
            return view.raw.gather(-1, columns).unflatten(1, (ids.shape[1], group)).transpose(2, 3)
        h_q, h_k = self._codes(cache, ids, view)
        return differing(h_q.unsqueeze(-2), h_k)

    def _codes(self, cache: Keys, ids: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Sign codes of the queries [B, H, T, G, W] and of the keys at ids [B, H, T, 1 or G, K, W]."""
        assert view.query is not None
        signs = view.query if view.query.ndim == 4 else view.query[..., -1, :]  # the last plane holds the signs
        heads = ids.shape[1]
        own = max(cache.codes.shape[1] // heads, 1)  # G where keys are encoded per query head, else 1
        h_k = cache.gather("codes", ids.repeat_interleave(own, dim=1)).unflatten(1, (heads, own)).transpose(2, 3)
        return signs.unflatten(1, (heads, -1)).transpose(2, 3), h_k

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, a={self.a.item():g}"
