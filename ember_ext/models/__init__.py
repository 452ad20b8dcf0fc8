"""The paper's two language models: a Transformer and its continuous-time counterpart.

    >>> import torch
    >>> from ember_ext.models import LiquidEmber, LiquidEmberConfig
    >>> model = LiquidEmber(LiquidEmberConfig(n_layer=2, n_embd=16, cfc_units=24, vocab_size=65))
    >>> tokens = torch.randint(65, (4, 33))
    >>> logits, loss, _ = model(tokens[:, :-1], tokens[:, 1:])
    >>> model.generate(tokens[:1, :5], max_new_tokens=7).shape
    torch.Size([1, 12])

Names are nanoGPT's where it has one. Under every condition of one random seed the weights that
conditions share start out equal.
"""

from ember_ext.models.ember import Ember, EmberConfig, EmberState
from ember_ext.models.liquid_ember import LiquidEmber, LiquidEmberConfig, LiquidEmberState

__all__ = [
    "Ember",
    "EmberConfig",
    "EmberState",
    "LiquidEmber",
    "LiquidEmberConfig",
    "LiquidEmberState",
]
