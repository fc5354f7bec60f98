"""A function of the shape of torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from torch import Tensor

from hashattn.attention import HashAttention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    index: HashAttention,
) -> Tensor:
    """PyTorch's signature and meaning, with the softmax over what `index` selects.

    Args:
        query: [B, Hq, T, D].
        key, value: [B, Hkv, N, D].
        attn_mask: must be None: which keys are kept is what index decides.
        dropout_p: must be 0.
        is_causal: query t sees keys 0 to t; then T must equal N.
        scale: of the logits, 1 / sqrt(D) by default.
        enable_gqa: must be True if Hq differs from Hkv, as in PyTorch.
        index: the composition that encodes, searches, selects and attends.

    Returns:
        [B, Hq, T, D].

    Raises:
        ValueError: an argument that cannot be served; the message says what would be.
    """
    if attn_mask is not None:
        raise ValueError(
            f"attn_mask must be None, got a tensor of shape {[*attn_mask.shape]}: give left padding as attn(q, k, v, "
            "start=...), causality as is_causal"
        )
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p must be 0 (this is inference), got {dropout_p}")
    if is_causal and query.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"is_causal needs as many queries as keys, got {query.shape[-2]} and {key.shape[-2]}: PyTorch aligns "
            "them at the first key, decoding at the last; attn(q, k, v, causal=True) does the latter"
        )
    if not enable_gqa and query.ndim == 4 and query.shape[1] != key.shape[1]:
        raise ValueError(f"enable_gqa must be True for {query.shape[1]} query heads and {key.shape[1]} KV heads")
    return index(query, key, value, scale=scale, causal=is_causal)
