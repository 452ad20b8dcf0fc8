"""The paper's two language models: a Transformer and its continuous-time counterpart.

    >>> model = LiquidEmber(LiquidEmberConfig(n_layer=2, n_embd=128, cfc_units=192))
    >>> logits, loss, _ = model(idx, targets)
    >>> text = model.generate(prompt, max_new_tokens=500)

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
