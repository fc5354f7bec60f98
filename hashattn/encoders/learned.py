"""LearnedHash: what the encoders with trained projections share."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from hashattn.core.checks import check_int, check_seed
from hashattn.core.lasting import lasting
from hashattn.encoders.base import (
    Encoder,
    check_bits,
    key_bits,
    query_planes,
    subtract,
)
from hashattn.encoders.bias import NEUTRAL, KeyBias, check_bias, write_bias
from hashattn.encoders.centring import Centring, check_centring
from hashattn.encoders.fitted import part_of_heads
from hashattn.encoders.hash_net import HashNet
from hashattn.encoders.progress import progress_of
from hashattn.encoders.simhash import orthogonal_planes
from hashattn.ops.decode import Map

DEFAULT_CENTRING = Centring()


class LearnedHash(nn.Module, Encoder):
    """Signs of trained projections. Before fit() it is SimHash with the frozen centre of each row, and warns once.

    The weights are made when the first keys or queries (or a state_dict) show the head dimension. Everything is
    computed in float32. An MLP's queries are scaled to unit mean square first.
    """

    @lasting
    def __init__(
        self, bits: int, query_bits: int, heads: int | None, centring: Centring | None, seed: int, bias_bits: int = 0
    ) -> None:
        super().__init__()
        self.bits, self.query_bits = check_bits(bits, query_bits)
        self.bias_bits = check_int("bias_bits", bias_bits, 0)
        check_bias(self.bits, self.query_bits, self.bias_bits)
        self.heads = heads if heads is None else check_int("heads", heads, 1, hint="or None, shared by all")
        self.seed = check_seed(seed)
        self._row_centring = check_centring(centring)
        self.query_net: HashNet | None = None
        self.key_net: HashNet | None = None
        self.key_bias: KeyBias | None = None
        self.mean: Tensor
        self.register_buffer("mean", torch.empty(0))  # [Hkv, D] once fitted
        self._warned = False

    @abstractmethod
    def _make_nets(self, planes: Tensor) -> tuple[HashNet, HashNet]:
        """The query's and the key's network, both starting at these planes [D, bits]."""

    @abstractmethod
    def _hidden(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths of the query's and the key's hidden layers."""

    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        return self._hidden() if self.heads in (None, 1) and not self.biased else None

    @property
    def biased(self) -> bool:  # type: ignore[override]
        return self.bias_bits > 0

    @property
    def sign_bits(self) -> int:
        """Bits of a code that are signs."""
        return self.bits - self.bias_bits

    @property
    def fitted(self) -> bool:
        """Whether fit() ran or fitted weights were loaded."""
        return self.mean.numel() > 0

    @property
    def centring(self) -> Centring | None:  # type: ignore[override]
        """How a row's centre is frozen; None once fitted, when the centre of fit() is used instead."""
        return None if self.fitted else self._row_centring

    def code_heads(self, kv_heads: int) -> int:
        return max(kv_heads, self.heads or 1)

    def check_model(self, q_heads: int, kv_heads: int, head_dim: int) -> None:
        if self.heads not in (None, 1, kv_heads, q_heads):
            raise ValueError(
                f"heads must be None, 1, Hkv = {kv_heads} or Hq = {q_heads} for these heads, got {self.heads}"
            )
        if self.key_net is not None and self.key_net.skip.shape[1] != head_dim:
            raise ValueError(f"this encoder has weights for head_dim {self.key_net.skip.shape[1]}, but got {head_dim}")
        if self.fitted and len(self.mean) != kv_heads:
            raise ValueError(f"this encoder was fitted to {len(self.mean)} KV heads, but got {kv_heads}")

    @lasting
    def build(self, head_dim: int, device: torch.device | str = "cpu") -> Self:
        """Make the weights for this head dimension, if there are none yet. Returns itself."""
        if self.query_net is None:
            planes = orthogonal_planes(head_dim, self.sign_bits, self.seed, torch.device(device))
            self.query_net, self.key_net = self._make_nets(planes)
        return self

    @lasting
    def build_bias(self, heads: int) -> Self:
        """Make the weights of the keys' bias, if it has one and there are none yet. Returns itself."""
        if self.biased and self.key_bias is None:
            assert self.key_net is not None
            planes = self.key_net.skip
            self.key_bias = KeyBias(heads, planes.shape[1], self.seed + 2).to(planes.device)
        return self

    def prepare(self, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.build(head_dim, device).build_bias(self.code_heads(kv_heads))
        self.mean = torch.empty((kv_heads, head_dim), device=device)

    def project_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        """Keys before the sign: float32 [B, code heads, N, bits - bias_bits]."""
        x = self.centred(k, centre)
        assert self.key_net is not None
        return self.key_net(x)

    def project_query(self, q: Tensor) -> Tensor:
        """Queries before the sign: float32 [B, Hq, T, bits - bias_bits]."""
        self.build(q.shape[-1], q.device)
        assert self.query_net is not None
        q = q.float()
        if not len(self.query_net.weights):  # the size of a query changes nothing in a linear map's code
            return self.query_net(q)
        return self.query_net(q * torch.rsqrt(q.square().mean(-1, keepdim=True).clamp(min=1e-12)))

    def centred(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        """Keys [B, Hkv, N, D] minus the fitted centre, or this one: float32, a row for each head of codes."""
        self.build(k.shape[-1], k.device)
        x = subtract(k, self.mean.unsqueeze(0) if self.fitted else centre)
        repeats = self.code_heads(k.shape[1]) // k.shape[1]
        return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)

    @property
    def fitted_centre(self) -> Tensor | None:
        return self.mean if self.fitted else None

    def for_heads(self, first: int, count: int) -> Self:
        if not self.fitted:
            if self.heads in (None, 1) and not self.biased:
                return self
            raise RuntimeError(f"this {type(self).__name__} is not fitted: nobody knows which of its weights are whose")
        kv_heads, sets = len(self.mean), self.heads or 1
        part = part_of_heads(self, kv_heads, first, count, {"mean": 1})
        part._modules = dict(self._modules)
        each = sets // kv_heads
        if each:
            part.heads = count * each
            part.query_net, part.key_net = (
                None if net is None else net.for_heads(kv_heads, first, count, each)
                for net in (self.query_net, self.key_net)
            )
        if self.key_bias is not None:
            rows = self.code_heads(kv_heads) // kv_heads
            names = ("weight", "bias", "out", "shift")
            part.key_bias = part_of_heads(self.key_bias, kv_heads, first, count, dict.fromkeys(names, rows))
        return part

    def check_fitted(self) -> None:
        """Random planes serve until it is; encode_key() warns."""

    def maps(self, head_dim: int, device: torch.device) -> tuple[Map, Map]:
        if self.widths() is None:
            return super().maps(head_dim, device)
        self.build(head_dim, device)
        assert self.query_net is not None and self.key_net is not None
        return self.query_net.as_map(unit=len(self.query_net.weights) > 0), self.key_net.as_map(unit=False)

    def warn_unfitted(self) -> None:
        if not self.fitted and not self._warned:
            self._warned = True
            warnings.warn(
                f"this {type(self).__name__} is not fitted: it hashes with random planes, as SimHash does, until "
                "fit(q, k) is called or fitted weights are loaded",
                UserWarning,
                stacklevel=3,
            )

    def encode_key(self, k: Tensor, centre: Tensor | None = None) -> Tensor:
        self.warn_unfitted()
        with torch.no_grad():
            x = self.centred(k, centre)
            assert self.key_net is not None
            codes = key_bits(self.key_net(x))
            if not self.biased:
                return codes
            return write_bias(codes, NEUTRAL if self.key_bias is None else self.key_bias.penalties(x))

    def encode_query(self, q: Tensor) -> Tensor:
        with torch.no_grad():
            return query_planes(self.project_query(q), self.query_bits)

    def fit(self, q: Tensor, k: Tensor, **options: Any) -> Self:
        """Learn from queries [B, Hq, T, D], those of the last T of N positions, and keys [B, Hkv, N, D] of one layer.

        Args:
            options: loss="ranking", steps=400, lr=3e-3, ...; see :func:`hashattn.encoders.fitting.fit`, which also
                takes several texts. progress=True shows a bar (needs tqdm).

        Raises:
            ValueError: shapes that disagree, or an option that cannot be used.
        """
        from hashattn.encoders.fitting import fit, samples_of

        with progress_of(options.get("steps", 400), options.pop("progress", False)) as watch:
            fit(self, samples_of(q, k), **{"watch": watch, **options})
        self.fits += 1
        return self

    @lasting
    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        if prefix + "key_net.skip" in state_dict:  # shapes are known only now
            self.build(state_dict[prefix + "key_net.skip"].shape[1], self.mean.device)
        if prefix + "key_bias.out" in state_dict:
            self.build_bias(len(state_dict[prefix + "key_bias.out"]))
        if prefix + "mean" in state_dict:
            self.mean = torch.empty_like(state_dict[prefix + "mean"], device=self.mean.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.fits += 1

    def extra_repr(self) -> str:
        bias = f", bias_bits={self.bias_bits}" if self.bias_bits else ""
        return f"bits={self.bits}, query_bits={self.query_bits}, heads={self.heads}{bias}, fitted={self.fitted}"
