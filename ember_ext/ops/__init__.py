"""The public operators: argument checks, fake kernels, autograd and autocast.

Each function here has a definition of the same name in `ember_ext.reference`.
"""

from ember_ext.ops.lif_gate import lif_gate

__all__ = ["lif_gate"]
