"""Fused LIF gates, LIF attention, and CfC and LTC networks for PyTorch.

The operators live in `ember_ext.ops`, the modules in `ember_ext.nn`, and the definition of every
operator, in plain PyTorch, in `ember_ext.reference`.
"""

import warnings
from pkgutil import extend_path

# `python -m pytest` in a clone imports this folder, while the compiled libraries sit in the
# installed copy: with both folders on the package's path, Python files come from here and
# libraries from there.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"

from ember_ext import _native

if _native.library is None:  # it is there where the package is reloaded
    _native.load(__version__)

# Argument checks look at shapes. A trace may forget them, because its result takes other shapes.
warnings.filterwarnings("ignore", category=_native.TracerWarning, module="ember_ext")

from ember_ext import models, nn, ops, reference  # noqa: E402
from ember_ext._native import use_reference  # noqa: E402
from ember_ext.nn import accelerate, decelerate  # noqa: E402
from ember_ext.ops import (  # noqa: E402
    cfc_scan,
    lif_attention,
    lif_gate,
    ltc_scan,
    ltc_synapses,
    refractory_lif_attention,
)

__all__ = [
    "__version__",
    "accelerate",
    "cfc_scan",
    "decelerate",
    "lif_attention",
    "lif_gate",
    "ltc_scan",
    "ltc_synapses",
    "models",
    "nn",
    "ops",
    "reference",
    "refractory_lif_attention",
    "use_reference",
]
