"""`ember_ext.accelerate`: which modules it replaces, which it leaves, and that results stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ncps.torch
import pytest
import torch
from ncps.wirings import AutoNCP
from torch import nn
from torch.nn.utils import parametrize

import ember_ext
from ember_ext.nn.accelerate import ACCELERATED


class Forecaster(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wired = ncps.torch.CfC(4, AutoNCP(14, 3))
        self.dense = nn.ModuleList([ncps.torch.CfC(3, 5), nn.Linear(5, 2)])
        self.mixed = ncps.torch.CfC(2, 5, mixed_memory=True)
        self.ltc = nn.ModuleList([ncps.torch.LTC(5, AutoNCP(11, 4)), ncps.torch.LTC(4, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.wired(x)
        x, _ = self.dense[0](x)
        x, _ = self.mixed(self.dense[1](x))
        for layer in self.ltc:
            x, _ = layer(x)
        return x


def test_replaces_in_place_with_the_same_results() -> None:
    model = Forecaster()
    x = torch.randn(3, 6, 4)
    expected = model(x)
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    trainable = [p for p in parameters if p.requires_grad]
    gradients = torch.autograd.grad(expected.sum(), trainable)
    report = ember_ext.accelerate(model)
    assert report.replaced == ("wired", "dense.0", "mixed", "ltc.0", "ltc.1")
    assert report.left == {}
    lines = str(report).splitlines()
    assert lines[0] == "wired (CfC): accelerated"
    assert lines[-1] == "ltc.1 (LTC): accelerated"
    assert isinstance(model.wired, ember_ext.nn.CfC)
    assert isinstance(model.ltc[0], ember_ext.nn.LTC)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)
    actual = torch.autograd.grad(model(x).sum(), trainable)
    torch.testing.assert_close(actual, gradients)
    assert ember_ext.accelerate(model).replaced == ()


@pytest.mark.parametrize("kind", ACCELERATED, ids=lambda kind: kind.__name__)
def test_a_model_that_is_itself_a_layer_keeps_its_hooks(kind: Any) -> None:
    model = kind(4, 6)
    calls: list[nn.Module] = []
    model.register_forward_hook(lambda module, *_: calls.append(module))
    assert ember_ext.accelerate(model).replaced == ("",)
    model(torch.randn(1, 2, 4))
    assert calls == [model]
    model.step(torch.randn(1, 4))


class Doubling(ncps.torch.CfC):
    def forward(self, *arguments: object) -> object:
        return super().forward(*arguments)


class DoublingLTC(ncps.torch.LTC):
    pass


def changed_ltc(change: Callable[[Any], object], **options: Any) -> nn.Module:
    model = ncps.torch.LTC(4, 6, **options)
    change(model)
    return model


def parametrise(model: Any) -> None:
    parametrize.register_parametrization(model.rnn_cell, "w", nn.Softplus(), unsafe=True)


def assign(model: Any) -> None:
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)


class OwnCell(ncps.torch.LTCCell):
    def _sigmoid(self, *arguments: torch.Tensor) -> torch.Tensor:
        return 2 * super()._sigmoid(*arguments)


class Adapted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_adapter() -> nn.Module:
    model = ncps.torch.CfC(4, 6)
    model.rnn_cell.ff1 = Adapted(128, 6)
    return model


def with_hook() -> nn.Module:
    model = ncps.torch.CfC(4, AutoNCP(9, 2))
    model.rnn_cell.layer_1.register_forward_hook(lambda *_: None)
    return model


def with_own_forward() -> nn.Module:
    model = ncps.torch.CfC(4, 6)
    model.forward = lambda x: (x, None)
    return model


def with_part(place: str, part: nn.Module | None, **options: Any) -> nn.Module:
    """A CfC with one module replaced, or without it."""
    model = ncps.torch.CfC(4, 6, **options)
    owner, _, name = place.rpartition(".")
    if part is None:
        delattr(model.get_submodule(owner), name)
    else:
        setattr(model.get_submodule(owner), name, part)
    return model


def with_dropouts(*rates: float) -> nn.Module:
    model = ncps.torch.CfC(4, 6, backbone_layers=3, backbone_dropout=0.5)
    dropouts = [m for m in model.rnn_cell.backbone if isinstance(m, nn.Dropout)]
    for dropout, p in zip(dropouts, rates, strict=True):
        dropout.p = p
    return model


TWO_LAYERS = {"backbone_layers": 2}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Doubling(4, 6), "Doubling is a subclass"),
        (
            with_part("rnn_cell.backbone.1", nn.Identity()),
            "rnn_cell.backbone.1 is a Identity, which ncps does not put there",
        ),
        (with_part("rnn_cell.backbone.1", None), "rnn_cell.backbone is not made of Linear, act"),
        (with_part("rnn_cell.backbone.1", nn.Dropout(0.5)), "rnn_cell.backbone is not made of"),
        (with_part("rnn_cell.backbone.3", nn.ReLU(), **TWO_LAYERS), "backbone mixes activations"),
        (with_part("rnn_cell.backbone.1", nn.GELU("tanh")), "backbone approximates GELU by tanh"),
        (
            with_part("rnn_cell.backbone.1.tanh", nn.Hardtanh()),
            "activation.tanh is a torch.nn.modules.activation.Hardtanh",
        ),
        (with_part("rnn_cell.backbone.0", nn.Linear(10, 128, False)), "backbone.0 has no bias"),
        (with_part("rnn_cell.ff2", nn.Linear(128, 6, False)), "rnn_cell.ff2 has no bias"),
        (
            with_part("rnn_cell.sigmoid", nn.Hardsigmoid()),
            "sigmoid is a torch.nn.modules.activation.Hardsigmoid and no",
        ),
        (with_dropouts(0.5, 0.1), "rnn_cell.backbone has Dropouts that differ"),
        (
            with_part("lstm.tanh", nn.ReLU(), mixed_memory=True),
            "lstm.tanh is a torch.nn.modules.activation.ReLU",
        ),
        (
            with_part("lstm.recurrent_map", nn.Linear(6, 24), mixed_memory=True),
            "lstm.recurrent_map has a bias",
        ),
        (with_adapter(), "rnn_cell.ff1 is a Adapted with a forward of its own"),
        (with_hook(), "rnn_cell.layer_1 has hooks"),
        (with_own_forward(), "its forward was replaced"),
        (DoublingLTC(4, 6), "DoublingLTC is a subclass"),
        (changed_ltc(parametrise), "rnn_cell.w is another one than its forward computes with"),
        (changed_ltc(assign), "rnn_cell.gleak is another one than its forward computes with"),
        (
            changed_ltc(lambda m: setattr(m, "rnn_cell", OwnCell(m._wiring))),
            "rnn_cell has a _sigmoid of its own",
        ),
        (
            changed_ltc(lambda m: setattr(m.rnn_cell, "make_positive_fn", nn.ReLU())),
            "rnn_cell.make_positive_fn is a torch.nn.modules.activation.ReLU",
        ),
        (
            changed_ltc(lambda m: setattr(m.lstm, "tanh", nn.ReLU()), mixed_memory=True),
            "lstm.tanh is a torch.nn.modules.activation.ReLU",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_leaves_what_computes_something_else(model: nn.Module, reason: str) -> None:
    kind = type(model)
    report = ember_ext.accelerate(model)
    assert reason in report.left[""]
    assert type(model) is kind


def test_unusual_backbones_are_replaced_where_their_results_stay() -> None:
    model = with_dropouts(0.5, 0.5).eval()
    model.rnn_cell.backbone[0] = nn.Linear(10, 128)
    x = torch.randn(2, 3, 4)
    expected, _ = model(x)
    assert ember_ext.accelerate(model).replaced == ("",)
    torch.testing.assert_close(model(x)[0], expected)


def test_parametrised_weights_are_followed() -> None:
    model = ncps.torch.CfC(4, 6)
    nn.utils.parametrizations.weight_norm(model.rnn_cell.ff1)
    x = torch.randn(2, 3, 4)
    expected, _ = model(x)
    assert ember_ext.accelerate(model).replaced == ("",)
    torch.testing.assert_close(model(x)[0], expected)


def test_nothing_to_do() -> None:
    assert str(ember_ext.accelerate(nn.Linear(2, 2))) == (
        "no ncps.torch.CfC or ncps.torch.LTC or ncps.torch.CfCCell or "
        "ncps.torch.LTCCell or ncps.torch.WiredCfCCell found"
    )


class PlainCell(ncps.torch.LTCCell):
    """A subclass that computes as ncps does."""


def test_an_ltc_s_cell_changes_with_its_layer() -> None:
    model, subclass = ncps.torch.LTC(4, 6), ncps.torch.LTC(4, 6)
    subclass.rnn_cell.__class__ = PlainCell
    x = torch.randn(2, 3, 4)
    expected = subclass(x)[0]
    ember_ext.accelerate(nn.ModuleList([model, subclass]))
    assert type(model.rnn_cell) is ember_ext.nn.LTCCell
    assert type(subclass) is ember_ext.nn.LTC
    assert type(subclass.rnn_cell) is PlainCell
    torch.testing.assert_close(subclass(x)[0], expected)
    assert ember_ext.decelerate(model).replaced == ("",)
    assert type(model.rnn_cell) is ncps.torch.LTCCell


def test_decelerate_leaves_an_ltc_that_ncps_would_not_follow() -> None:
    parametrised, pruned = ember_ext.nn.LTC(4, 6), ember_ext.nn.LTC(4, 6)
    parametrise(parametrised)
    nn.utils.prune.l1_unstructured(pruned.rnn_cell, "w", 0.5)
    report = ember_ext.decelerate(nn.ModuleList([parametrised, pruned]))
    assert report.replaced == ()
    assert report.left["0"].startswith("rnn_cell is a ParametrizedLTCCell")
    assert report.left["1"] == "rnn_cell.w is computed, which ncps would not follow"
    # What was assigned is what ncps computes with from then on.
    assigned = ember_ext.nn.LTC(4, 6)
    assign(assigned)
    x = torch.randn(2, 3, 4)
    expected, _ = assigned(x)
    assert ember_ext.decelerate(assigned).replaced == ("",)
    torch.testing.assert_close(assigned(x)[0], expected)
