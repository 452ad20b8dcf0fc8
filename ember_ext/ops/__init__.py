"""The operators, as functions of tensors.

Each function has a definition of the same name in `ember_ext.reference`. Under forward-mode AD and
the transforms of `torch.func` a function runs its definition, and a warning says so once. A
backward pass that is to be differentiated itself (`create_graph=True`) runs the definition too: the
kernels have gradients, and derivatives of any order are those of the definition.
"""

from ember_ext import _native
from ember_ext.ops import _flops
from ember_ext.ops._export import make_saveable
from ember_ext.ops.cfc_scan import cfc_scan
from ember_ext.ops.lif_attention import lif_attention
from ember_ext.ops.lif_gate import lif_gate
from ember_ext.ops.ltc_scan import ltc_scan, ltc_synapses
from ember_ext.ops.refractory_lif_attention import refractory_lif_attention
from ember_ext.reference.cfc_scan import Affine, CfCWeights
from ember_ext.reference.lif_attention import AttentionSummary
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights
from ember_ext.reference.refractory_lif_attention import RefractoryState

__all__ = [
    "Affine",
    "AttentionSummary",
    "CfCWeights",
    "LTCSynapses",
    "LTCWeights",
    "RefractoryState",
    "cfc_scan",
    "lif_attention",
    "lif_gate",
    "ltc_scan",
    "ltc_synapses",
    "refractory_lif_attention",
]

make_saveable(Affine, AttentionSummary, CfCWeights, LTCSynapses, LTCWeights, RefractoryState)
if _native.has("cpu"):
    _flops.register()
