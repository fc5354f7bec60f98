"""Configs of its own for an attached model: transformers chooses the attention function by what a config says."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

CHOICE = "_attn_implementation_internal"


@dataclass
class OwnConfigs:
    """Copies that took the place of a model's configs, since other models may share these.

    Attributes:
        places: the modules whose config was replaced, with what they had.
        copies: (original, copy, what the copy held at first).
    """

    places: list[tuple[nn.Module, PreTrainedConfig]] = field(default_factory=list)
    copies: list[tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any]]] = field(default_factory=list)

    def install(self, model: PreTrainedModel, modules: dict[int, nn.Module], name: str) -> None:
        """Let the attention modules, and what makes their masks, choose the attention function `name`."""
        text = model.config.get_text_config(decoder=True)
        chosen = {id(config) for config in (text, *(m.config for m in modules.values()))}
        copied: dict[int, PreTrainedConfig] = {}
        for module in model.modules():
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig):
                own = self._copy(config, chosen, copied, name)
                if own is not config:
                    self.places.append((module, config))
                    vars(module)["config"] = own

    def restore(self) -> None:
        """Give all modules their configs back, with what was changed in the copies meanwhile."""
        for module, config in self.places:
            vars(module)["config"] = config
        originals = {id(own): config for config, own, _ in self.copies}
        for config, own, held in self.copies:
            for key, value in vars(own).items():
                if key != CHOICE and id(value) not in originals and value is not held.get(key, originals):
                    vars(config)[key] = value
            vars(own)[CHOICE] = vars(config)[CHOICE]  # whoever took the copy meanwhile
        self.places, self.copies = [], []

    def _copy(
        self, config: PreTrainedConfig, chosen: set[int], copied: dict[int, PreTrainedConfig], name: str
    ) -> PreTrainedConfig:
        """The copy of a config that is chosen or holds such a one; other configs as they are."""
        if id(config) in copied:
            return copied[id(config)]
        inner = {key: vars(config).get(key) for key in config.sub_configs}
        parts = {k: c for k, c in inner.items() if isinstance(c, PreTrainedConfig)}
        new = {key: self._copy(part, chosen, copied, name) for key, part in parts.items()}
        own = config
        if id(config) in chosen or any(new[key] is not parts[key] for key in parts):
            own = copy.copy(config)
            vars(own).update(new)
            if id(config) in chosen:
                vars(own)[CHOICE] = name
            self.copies.append((config, own, dict(vars(own))))
        copied[id(config)] = own
        return own
