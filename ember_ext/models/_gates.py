"""The parameters of gates that only :class:`~ember_ext.models.Ember` has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ember_ext.nn.lif_gate import GateParameters, LIFParameters, PresetName


class PersistenceParameters(LIFParameters):
    r"""The parameters of LIF gates whose threshold rises with how much earlier layers have fired.

    The threshold is :math:`\theta + \mathrm{coupling} \cdot \mathrm{trace}`, and the trace is
    multiplied by the persistence in each layer before the mean firing of that layer is added. As in
    :class:`~ember_ext.nn.LIFParameters`, raw values are learnt, and the properties `persistence`
    and `coupling` are the effective ones: a sigmoid and a softplus of them.

    Args:
        num_units: number of heads.
        preset: as for `LIFParameters`.

    Attributes:
        raw_persistence (Tensor): [num_units].
        raw_coupling (Tensor): [num_units].

    Examples::

        >>> from ember_ext.models import PersistenceParameters
        >>> gates = PersistenceParameters(2)
        >>> gates.persistence.detach(), gates.coupling.detach()
        (tensor([0.7311, 0.7311]), tensor([0.1269, 0.1269]))
    """

    _effective = (*LIFParameters._effective, "persistence", "coupling")

    RAW_PERSISTENCE = 1.0
    RAW_COUPLING = -2.0

    def __init__(self, num_units: int, *, preset: PresetName = "text") -> None:
        super().__init__(num_units, preset=preset)
        self.raw_persistence = nn.Parameter(torch.empty(num_units))
        self.raw_coupling = nn.Parameter(torch.empty(num_units))
        self._reset_couplings()

    def reset_parameters(self) -> None:
        """Fill the raw values with their initial constants. This draws no random numbers."""
        super().reset_parameters()
        if "raw_coupling" in self._parameters:  # not yet when the gate's own values are filled
            self._reset_couplings()

    def _reset_couplings(self) -> None:
        nn.init.constant_(self.raw_persistence, self.RAW_PERSISTENCE)
        nn.init.constant_(self.raw_coupling, self.RAW_COUPLING)

    def _values(self) -> tuple[Tensor, ...]:
        persistence, coupling = torch.sigmoid(self.raw_persistence), F.softplus(self.raw_coupling)
        return *super()._values(), persistence, coupling

    @property
    def persistence(self) -> Tensor:
        """What is left of the trace after a layer, [num_units], within (0, 1); differentiable."""
        return self._values()[3]

    @property
    def coupling(self) -> Tensor:
        """How much the trace raises the threshold, [num_units], above 0; differentiable."""
        return self._values()[4]


class MembraneGate(GateParameters):
    r"""A gate on the MLP of a block, by a membrane potential that is carried across layers.

    Each token has a potential V, which is 0 before the first layer. The output y of attention
    charges it, and the gate's firing G, which multiplies the MLP's output, discharges it:

    .. math::

        V &\leftarrow \mathrm{leak} \cdot V + \lVert y \rVert_2, \\
        G &= \sigma\bigl(\mathrm{steepness} \cdot (V - \mathrm{threshold})\bigr), \\
        V &\leftarrow V (1 - G).

    A token's potential depends on its own layers only, so nothing looks ahead, and there is nothing
    to cache. The gate is not open at the start: with V = 0 it lets 0.235 of the MLP pass.

    Raw values are learnt, and the properties `leak`, `threshold` and `steepness` are the effective
    ones: a sigmoid, a softplus and a softplus of them. The source is the paper's released code;
    section 6.3 of its text names the gate as future work.

    Attributes:
        raw_leak (Tensor): [1], like the other two; at the start 1.
        raw_threshold (Tensor): at the start 0.
        raw_steepness (Tensor): at the start 1.5.

    Examples::

        >>> import torch
        >>> from ember_ext.models import MembraneGate
        >>> gate = MembraneGate()
        >>> attended, processed = torch.randn(2, 3, 5, 8)  # attention's and the MLP's output
        >>> y, potential = gate(processed, attended, torch.zeros(1))
        >>> y.shape, potential.shape
        (torch.Size([3, 5, 8]), torch.Size([3, 5, 1]))
    """

    _effective = ("leak", "threshold", "steepness")

    RAW_LEAK = 1.0
    RAW_THRESHOLD = 0.0
    RAW_STEEPNESS = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.raw_leak = nn.Parameter(torch.empty(1))
        self.raw_threshold = nn.Parameter(torch.empty(1))
        self.raw_steepness = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the raw values with their initial constants. This draws no random numbers."""
        nn.init.constant_(self.raw_leak, self.RAW_LEAK)
        nn.init.constant_(self.raw_threshold, self.RAW_THRESHOLD)
        nn.init.constant_(self.raw_steepness, self.RAW_STEEPNESS)

    def _values(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.sigmoid(self.raw_leak),
            F.softplus(self.raw_threshold),
            F.softplus(self.raw_steepness),
        )

    @property
    def leak(self) -> Tensor:
        """What is left of the potential at the next layer, [1], within (0, 1); differentiable."""
        return self._values()[0]

    @property
    def threshold(self) -> Tensor:
        """The potential at which half of the MLP passes, [1], above 0; differentiable."""
        return self._values()[1]

    @property
    def steepness(self) -> Tensor:
        """The steepness of the gate, [1], above 0; differentiable."""
        return self._values()[2]

    def forward(self, z: Tensor, y: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
        """Gate z, the output of the MLP.

        Args:
            z: [B, T, n_embd].
            y: the output of attention in the same block, [B, T, n_embd].
            potential: what the gate of the layer below returned, [B, T, 1], where each dimension
                may be 1.

        Returns:
            G z, in the dtype of z, and the potential [B, T, 1], in fp32 (fp64 for fp64 input).
        """
        dtype = torch.promote_types(y.dtype, torch.float32)
        leak, threshold, steepness = (v.to(dtype) for v in self._values())
        charge = torch.linalg.vector_norm(y, dim=-1, keepdim=True, dtype=dtype)
        potential = leak * potential.to(dtype) + charge
        gate = torch.sigmoid(steepness * (potential - threshold))
        return z * gate.to(z.dtype), potential * (1 - gate)
