"""What each operator computes, in plain PyTorch: the text that kernels and tests are held to.

These modules import only torch, run in any floating dtype and on any device, and are
differentiable by autograd.
"""

from ember_ext.reference.cfc_scan import cfc_scan
from ember_ext.reference.lif_attention import lif_attention
from ember_ext.reference.lif_gate import lif_gate
from ember_ext.reference.ltc_scan import ltc_scan
from ember_ext.reference.refractory_lif_attention import refractory_lif_attention

__all__ = ["cfc_scan", "lif_attention", "lif_gate", "ltc_scan", "refractory_lif_attention"]
