"""The paper's two language models: a Transformer and its continuous-time counterpart.

Names are nanoGPT's where it has one. Models that are built with the same random seed have equal
weights wherever their conditions share them.
"""

from ember_ext.models._base import LanguageModel
from ember_ext.models._gates import MembraneGate, PersistenceParameters
from ember_ext.models.ember import Ember, EmberConfig, EmberState
from ember_ext.models.liquid_ember import LiquidEmber, LiquidEmberConfig, LiquidEmberState
from ember_ext.reference.persistent_lif_attention import PersistenceState

__all__ = [
    "Ember",
    "EmberConfig",
    "EmberState",
    "LanguageModel",
    "LiquidEmber",
    "LiquidEmberConfig",
    "LiquidEmberState",
    "MembraneGate",
    "PersistenceParameters",
    "PersistenceState",
]
