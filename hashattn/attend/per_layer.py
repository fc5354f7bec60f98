"""PerLayerAttend: one attend stage for each layer of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hashattn.attend.base import Attend, Keys
from hashattn.core.types import Output, Selection
from hashattn.index.view import View


class PerLayerAttend(nn.Module, Attend):
    """Holds the attend stages of a model's layers, each fitted to its own; attn.layer(i) picks one.

    Args:
        stages: {layer: nn.Module stage}, such as a fitted MixedPrecision, all of one class.
    """

    def __init__(self, stages: Mapping[int, nn.Module]) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages must hold at least one attend stage, got none")
        for i, stage in stages.items():
            if not (isinstance(stage, Attend) and isinstance(stage, nn.Module)):
                raise TypeError(f"stages[{i}] must be an attend stage with weights, got {type(stage).__name__}")
        kinds = sorted({type(stage).__name__ for stage in stages.values()})
        if len(kinds) > 1:
            raise ValueError(f"stages must be of one class, got {', '.join(kinds)}")
        self.stages = nn.ModuleDict({str(i): stages[i] for i in sorted(stages)})
        first = self.layer(min(stages))
        self.needs_selection, self.needs_norms, self.code = first.needs_selection, first.needs_norms, first.code

    @property
    def fused(self) -> bool:
        return all(stage.fused for stage in self.stages.values())

    @property
    def compiled(self) -> bool:
        return all(stage.compiled for stage in self.stages.values())

    def layer(self, i: int) -> Attend:
        if str(i) not in self.stages:
            raise ValueError(f"layer {i} has no attend stage of its own: these are of layers {', '.join(self.stages)}")
        stage = self.stages[str(i)]
        assert isinstance(stage, Attend)
        return stage

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
        raise TypeError("PerLayerAttend holds one stage a layer: call attn.layer(i), and attend with that")
