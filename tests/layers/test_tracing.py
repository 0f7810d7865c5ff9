"""An adapted model that is written down: by torch.jit.trace, torch.export and the TorchScript exporter to ONNX."""

from __future__ import annotations

import io

import pytest
import torch
from layer_cases import KINDS, Case, Holder, config, randomize
from torch import Tensor, nn

from lightning_oft import inject


class Masked(nn.Linear):
    """Runs a forward of its own on a rotated weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.weight.gt(0), self.bias)


NAMES = ("linear_3d", "conv1d_hf", "embedding_1d", "conv2d_groups", "conv_transpose1d", "attention")
CASES = {name: KINDS[name] for name in NAMES}
CASES["masked"] = Case(lambda: Holder(Masked(8, 6)), lambda: (torch.randn(3, 8),))


def _adapted(case: Case, exact: bool) -> nn.Module:
    model = case.build().eval()
    inject(model, config(use_cayley_neumann=not exact))
    randomize(model)
    return model


cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
exact = pytest.mark.parametrize("exact", [False, True], ids=["series", "exact"])
pytestmark = pytest.mark.filterwarnings(
    "ignore:block sizes adjusted",
    "ignore:There is a performance drop",
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning",
)


@exact
@cases
def test_a_traced_model_computes_the_same_and_follows_its_generators(case: Case, exact: bool) -> None:
    model = _adapted(case, exact)
    with torch.no_grad():
        if exact:
            model(*case.inputs())  # so that a rotation is at hand, which a trace would keep as a constant
        traced = torch.jit.trace(model, case.inputs(), check_trace=False)  # type: ignore[no-untyped-call]
        x = case.inputs()
        torch.testing.assert_close(traced(*x), model(*x))
        for name, parameter in traced.named_parameters():
            if "oft_R" in name:
                parameter.mul_(-1)
        torch.testing.assert_close(traced(*x), model(*x))  # the parameters are the model's own


@exact
@cases
def test_the_exporter_to_onnx_knows_every_operator(case: Case, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package `onnx` the exporter gives up when all is translated and nothing but the file is left."""
    monkeypatch.setattr(
        torch.backends.mha, "get_fastpath_enabled", lambda: False
    )  # which no frozen model can have there
    model = _adapted(case, exact)
    file, x = io.BytesIO(), case.inputs()
    try:
        torch.onnx.export(model, x, file, dynamo=False)
    except torch.onnx.OnnxExporterError as error:
        if "onnx is not installed" not in str(error):
            raise
        return
    session = pytest.importorskip("onnxruntime").InferenceSession(file.getvalue())
    names = [one.name for one in session.get_inputs()]
    (output,) = session.run(None, {name: value.numpy() for name, value in zip(names, x, strict=True)})
    torch.testing.assert_close(torch.from_numpy(output), model(*x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "masked", "conv2d_groups"])
def test_vmap_without_gradients_computes_the_same(name: str) -> None:
    model, (x,) = _adapted(CASES[name], exact=True), CASES[name].inputs()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.func.vmap(model)(torch.stack([x, x]))[1], expected)


def test_forward_mode_differentiation_goes_through_a_rotation() -> None:
    model, x = _adapted(CASES["linear_3d"], exact=True), torch.randn(3, 5, 12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    torch.testing.assert_close(tangent, model(x))  # the layer has no bias: it is linear


def test_an_exported_program_takes_as_many_rows_as_it_is_asked_to() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    inject(model, config(target_modules="all-linear"))
    randomize(model)
    rows = torch.export.Dim("rows", min=2, max=2**20)
    exported = torch.export.export(model.eval(), (torch.randn(4, 64),), dynamic_shapes=({0: rows},)).module()
    for count in (8, 2**14):  # rotated by native operators, and by a function of our own
        x = torch.randn(count, 64)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)
