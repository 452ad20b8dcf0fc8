"""The definitions of all operators in plain PyTorch, with which the tests compare the kernels.

They need nothing but torch, run in any floating dtype and on any device, and autograd can
differentiate them. They are readable and slow. :func:`~ember_ext.use_reference` runs them in place
of the compiled kernels.
"""

from ember_ext.reference.cfc_scan import cfc_scan
from ember_ext.reference.lif_attention import lif_attention
from ember_ext.reference.lif_gate import lif_gate
from ember_ext.reference.ltc_scan import ltc_scan
from ember_ext.reference.refractory_lif_attention import refractory_lif_attention

__all__ = ["cfc_scan", "lif_attention", "lif_gate", "ltc_scan", "refractory_lif_attention"]
