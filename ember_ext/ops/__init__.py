"""The public operators: argument checks, fake kernels, autograd and autocast.

Each function here has a definition of the same name in `ember_ext.reference`.
"""

from ember_ext.ops.cfc_scan import cfc_scan
from ember_ext.ops.lif_attention import lif_attention
from ember_ext.ops.lif_gate import lif_gate
from ember_ext.ops.refractory_lif_attention import refractory_lif_attention

__all__ = ["cfc_scan", "lif_attention", "lif_gate", "refractory_lif_attention"]
