"""The Rotation module: float32 whatever happens, a cache that is never stale, and no more memory than x and R."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import computed_maps, config, randomize
from torch import Tensor, nn

from lightning_oft import functional as maths
from lightning_oft import inject, oft_layers
from lightning_oft.layers import Rotation


def _rotation(blocks: int = 3, b: int = 4, std: float = 0.2, **options: Any) -> Rotation:
    rotation = Rotation(blocks * b, b, config(**options))
    nn.init.normal_(rotation.weight, std=std)
    return rotation


def _expected(rotation: Rotation, x: Tensor) -> Tensor:
    with torch.no_grad():
        r_nbb = maths.cayley_neumann(maths.skew(rotation.weight.detach().clone(), rotation.block_size), 6)
        full: Tensor = torch.block_diag(*r_nbb.expand(rotation.blocks, -1, -1))  # type: ignore[no-untyped-call]
        return x @ full


# ---- what it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_starts_as_the_exact_identity_and_returns_to_it(shared: bool) -> None:
    rotation = Rotation(12, 4, config(block_share=shared))
    x, eye = torch.randn(3, 12), torch.eye(4).expand(1 if shared else 3, 4, 4)
    assert rotation.weight.shape == (len(eye), 6)
    assert torch.equal(rotation(x), x)
    nn.init.normal_(rotation.weight)
    rotation.reset_parameters()
    assert torch.equal(rotation.matrix(), eye)


def test_a_random_start_lies_in_its_ball() -> None:
    assert 0.01 < float(Rotation(12, 4, config(init_weights=False)).weight.detach().std()) < 0.3
    rotation = Rotation(8, 4, config(init_weights=False, max_angle=1.0))
    assert rotation.radius is not None
    assert 0 < float(maths.frobenius_norm(rotation.weight.detach()).max()) <= rotation.radius * (1 + 1e-6)
    Rotation(8, 4, config(init_weights=False, max_angle=1.0), device="meta")


def test_a_shared_block_turns_every_slice_alike() -> None:
    rotation = _rotation(block_share=True)
    x = torch.randn(3, 12)
    torch.testing.assert_close(rotation(x), _expected(rotation, x))
    torch.testing.assert_close(rotation(x).unflatten(-1, (3, 4)), x.unflatten(-1, (3, 4)) @ rotation.matrix()[0])


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, lambda q: maths.cayley_neumann(q, 6)),
        ({"num_cayley_neumann_terms": 5}, lambda q: maths.cayley_neumann(q, 5)),
        ({"neumann_series": "unhalved"}, lambda q: maths.cayley_neumann(q, 6, halve_last=False)),
        ({"use_cayley_neumann": False}, maths.cayley),
    ],
)
def test_matrix_is_the_map_the_configuration_names(
    options: dict[str, Any], reference: Callable[[Tensor], Tensor]
) -> None:
    rotation = _rotation(**options)
    torch.testing.assert_close(rotation.matrix(), reference(maths.skew(rotation.weight, 4)), rtol=0, atol=3e-7)


def test_transpose_turns_back() -> None:
    rotation = _rotation(use_cayley_neumann=False)
    x = torch.randn(5, 12)
    torch.testing.assert_close(rotation(rotation(x), transpose=True), x)


def test_it_says_what_it_is() -> None:
    assert repr(_rotation(block_share=True, use_cayley_neumann=False)) == "Rotation(12, 3 blocks of 4, exact, shared)"


# ---- float32, always -------------------------------------------------------------------------------------------------


def _swap_cast(module: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "swap": _swap_cast,
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to_dtype": lambda m: m.to(torch.float16),
    "type": lambda m: m.type(torch.float64),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_leaves_generators_and_gradients_alone(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(12, 4))
    inject(model, config(target_modules=["0"]))
    randomize(model)
    rotation: Rotation = oft_layers(model)["0"].oft_R["default"]  # type: ignore[index, assignment]
    rotation.weight.grad = torch.ones_like(rotation.weight)
    before = rotation.weight.detach().clone()
    cast(model)
    base = next(p for name, p in model.named_parameters() if "oft_R" not in name)
    assert base.dtype != torch.float32
    assert rotation.weight.dtype == rotation.weight.grad.dtype == torch.float32
    assert torch.equal(rotation.weight, before)
    x = torch.randn(3, 12, dtype=base.dtype)
    assert model(x).dtype == base.dtype


def test_a_cast_on_the_meta_device_does_not_stay_in_the_memory_given_later() -> None:
    rotation = Rotation(12, 4, config(), device="meta")
    rotation.bfloat16()
    assert rotation(torch.empty(2, 12, device="meta")).shape == (2, 12)
    rotation.to_empty(device="cpu")
    rotation.reset_parameters()
    assert rotation.weight.dtype == torch.float32
    assert torch.equal(rotation.matrix(), torch.eye(4).expand(3, 4, 4))


def test_injection_below_a_low_default_dtype_is_float32() -> None:
    model = nn.Sequential(nn.Linear(12, 4)).bfloat16()
    x = torch.randn(3, 12).bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        inject(model, config(target_modules=["0"], module_dropout=0.5, init_weights=False))
        model.train()(x).sum().backward()
        rotation: Rotation = oft_layers(model)["0"].oft_R["default"]  # type: ignore[index, assignment]
        assert rotation.matrix().dtype == rotation.weight.dtype == torch.float32
        with torch.no_grad():
            model.eval()(x)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_autocast_does_not_reach_the_matrix(grad: bool) -> None:
    rotation, x = _rotation().eval(), torch.randn(3, 12)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotation(x), _rotated_plainly(rotation, x))
        assert rotation(x.bfloat16()).dtype == torch.bfloat16


def _rotated_plainly(rotation: Rotation, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return maths.rotate(x, rotation.matrix())


def test_a_rotation_of_bfloat16_inputs_is_computed_in_float32() -> None:
    rotation = _rotation(std=0.01)
    coarse = maths.cayley_neumann(maths.skew(rotation.weight.bfloat16(), 4), 6)
    x = torch.eye(12).bfloat16()
    assert torch.equal(rotation(x), torch.block_diag(*rotation.matrix().bfloat16()))
    assert not torch.equal(rotation(x), torch.block_diag(*coarse))


# ---- the cached matrix is never stale --------------------------------------------------------------------------------


def _swap(rotation: Rotation) -> None:
    torch.utils.swap_tensors(rotation.weight, nn.Parameter(torch.randn_like(rotation.weight) * 0.2))


def _optimize(**options: Any) -> Callable[[Rotation], None]:
    def step(rotation: Rotation) -> None:
        optimizer = torch.optim.AdamW(rotation.parameters(), lr=0.1, **options)
        with torch.enable_grad():
            rotation(torch.ones(2, 12)).square().sum().add(rotation.weight.sum()).backward()
        with torch.inference_mode(False):
            optimizer.step()

    return step


def _replace(rotation: Rotation) -> None:
    rotation.weight = nn.Parameter(torch.randn_like(rotation.weight) * 0.2)


def _storage_write(rotation: Rotation) -> None:
    rotation.weight.detach().numpy()[:] *= 2


EDITS: dict[str, Callable[[Rotation], Any]] = {
    "in_place": lambda r: r.weight.mul_(2),
    "data": lambda r: r.weight.data.mul_(2),
    "data_assigned": lambda r: setattr(r.weight, "data", r.weight.data * 2),
    "numpy": _storage_write,
    "one_entry": lambda r: r.weight.data[0, 0].add_(0.1),
    "parameter": _replace,
    "swap_tensors": _swap,
    "load_state_dict": lambda r: r.load_state_dict({"weight": r.weight * 2}),
    "load_assign": lambda r: r.load_state_dict({"weight": r.weight.detach() * 2}, assign=True),
    "adamw": _optimize(),
    "adamw_fused": _optimize(fused=True),
    "reset_parameters": lambda r: r.reset_parameters(),
    "project": lambda r: maths.project(r.weight, 0.01),
}


UNSEEN = ("data", "numpy", "one_entry")
"""What only a comparison can see: writing past autograd, outside of an optimizer."""


@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_leaves_a_stale_matrix(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for on_host in (True, False) if edit not in UNSEEN else (True,):
        monkeypatch.setattr("lightning_oft.functional.tracing._is_on_host", lambda _, on_host=on_host: on_host)
        rotation, x = _rotation().eval(), torch.randn(5, 12)
        with torch.no_grad():
            before = rotation(x)
            assert rotation._matrix_in(torch.float32) is rotation._matrix_in(torch.float32)
            EDITS[edit](rotation)
            after = rotation(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, _expected(rotation, x))


@pytest.mark.parametrize("held", ["array_of_the_weight", "weight_of_an_array", "memory_of_processes", "dlpack"])
def test_what_others_write_unseen_leaves_no_stale_matrix(held: str) -> None:
    """Memory whose writers torch does not know is compared; of any other a copy would part from it."""
    rotation, x = _rotation().eval(), torch.randn(5, 12)
    if held == "weight_of_an_array":
        rotation.weight = nn.Parameter(torch.from_numpy(rotation.weight.detach().numpy().copy()))
    if held == "memory_of_processes":
        rotation.weight.data.share_memory_()
    array: Any = rotation.weight.detach().numpy()
    if held == "dlpack":  # of the parameter itself, which it has to be frozen for
        array = torch.from_dlpack(rotation.weight.requires_grad_(False))
    with torch.no_grad():
        for _ in range(2):
            before = rotation(x)
            array[:] *= 2
            assert not torch.equal(rotation(x), before)
            torch.testing.assert_close(rotation(x), _expected(rotation, x))


def test_the_generators_of_a_cached_matrix_are_neither_copied_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation, x = _rotation().eval(), torch.randn(5, 12)
    with torch.no_grad():
        first = rotation(x)
        cached = rotation.cached
        assert cached is not None
        assert cached._memory is None
        assert torch._C._data_address(rotation.weight) == torch._C._data_address(cached._copy)  # type: ignore[attr-defined]
        assert torch.equal(rotation(x), first)
        assert rotation.cached is cached
        monkeypatch.delattr(torch, "_lazy_clone")  # another torch
        rotation.forget()
        assert torch.equal(rotation(x), first)
        assert rotation.cached._memory is not None
        assert rotation._matrix_in(torch.float32) is rotation._matrix_in(torch.float32)


@pytest.mark.parametrize("compares", [True, False], ids=["host", "accelerator"])
def test_optimizers_that_write_past_autograd_leave_no_stale_matrix(
    compares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit optimizers: kernels of their own that know addresses only, and `_version` stays (bitsandbytes, measured)."""
    monkeypatch.setattr("lightning_oft.functional.tracing._is_on_host", lambda _: compares)

    class ByAddress(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.detach().numpy()[:] += 0.1

    rotation, x = _rotation().eval(), torch.randn(5, 12)
    optimizer = ByAddress(rotation.parameters())
    with torch.no_grad():
        before, version = rotation(x), rotation.weight._version
        optimizer.step()
        assert rotation.weight._version == version
        assert not torch.equal(rotation(x), before)
        torch.testing.assert_close(rotation(x), _expected(rotation, x))


def test_bitsandbytes_leaves_no_stale_matrix() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rotation, x = _rotation(blocks=32, b=64, std=0.05).eval(), torch.randn(5, 2048)
    optimizer = bitsandbytes.optim.AdamW8bit(
        rotation.parameters(), lr=0.01
    )  # 0.1 turns beyond what float32 solves to 1e-6
    with torch.no_grad():
        before = rotation(x)
    rotation(x).square().sum().add(rotation.weight.sum()).backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(rotation(x), before)
        torch.testing.assert_close(rotation(x), _expected(rotation, x))


def test_the_matrix_is_computed_once_where_nothing_changes_and_afresh_where_gradients_flow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rotation, x, calls = _rotation().eval(), torch.randn(5, 12), computed_maps(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            rotation(x)
        assert len(calls) == 1
        rotation(x.bfloat16())
        assert len(calls) == 2
    rotation(x)
    rotation.train()
    with torch.no_grad():
        rotation(x)
    assert len(calls) == 4


def test_dtypes_in_turn_get_their_own() -> None:
    rotation, x = _rotation().eval(), torch.randn(5, 12)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
            torch.testing.assert_close(rotation(x.to(dtype)), _expected(rotation, x).to(dtype), rtol=2e-2, atol=5e-2)
            assert rotation(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("order", ["inference_first", "no_grad_first"])
def test_validation_in_inference_mode_then_training(order: str) -> None:
    rotation, x = _rotation(), torch.randn(5, 12)
    modes = [torch.inference_mode, torch.no_grad]
    for mode in modes if order == "inference_first" else reversed(modes):
        rotation.eval()
        with mode():
            torch.testing.assert_close(rotation(x), _expected(rotation, x))
    # eval with gradients, which may save whatever the cache returns for backward
    rotation(x).sum().backward()
    rotation.weight.grad = None
    rotation.train()
    rotation(x).sum().backward()
    assert rotation.weight.grad is not None
    with torch.no_grad():
        outside = rotation.eval()(x)
    assert not outside.is_inference()
    outside.requires_grad_().square().sum().backward()


def test_a_module_made_in_inference_mode_answers() -> None:
    with torch.inference_mode():
        rotation, x = _rotation().eval(), torch.randn(5, 12)
        for _ in range(2):
            torch.testing.assert_close(rotation(x), _expected(rotation, x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_no_share_in_the_cache(how: str) -> None:
    rotation, x = _rotation().eval(), torch.randn(5, 12)
    with torch.no_grad():
        before = rotation(x)
        twin = copy.deepcopy(rotation) if how == "deepcopy" else pickle.loads(pickle.dumps(rotation))
        assert torch.equal(twin(x), before)
        twin.weight.data.mul_(2)
        torch.testing.assert_close(twin(x), _expected(twin, x))
        assert torch.equal(rotation(x), before)


def test_half_of_a_module_in_training_mode_is_not_cached() -> None:
    rotation, x = _rotation(module_dropout=0.5), torch.randn(5, 12)
    with torch.no_grad():
        rotation.eval()(x)
        rotation.train()
        assert len({tuple(rotation(x).flatten().tolist()) for _ in range(20)}) > 1
        torch.testing.assert_close(rotation.eval()(x), _expected(rotation, x))


# ---- memory ----------------------------------------------------------------------------------------------------------


def _saved(run: Callable[[], Any]) -> dict[int, int]:
    """Bytes of each storage that a forward keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


def test_a_frozen_linear_layer_keeps_one_activation_and_no_copy_of_it() -> None:
    model = nn.Sequential(nn.Linear(64, 48)).bfloat16()
    inject(model, config(target_modules=["0"], oft_block_size=8))
    randomize(model)
    x = torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = _saved(lambda: model(x))
    large = {pointer: size for pointer, size in kept.items() if size >= x.untyped_storage().nbytes()}
    assert large == {x.data_ptr(): x.untyped_storage().nbytes()}
    weight = 64 * 48 * x.element_size()  # saved as it is, not copied, for the gradient of the input
    assert sum(kept.values()) - sum(large.values()) - weight < 40 * 8 * 8 * 8  # a few (8, 8, 8) float32 matrices


# ---- dropout, constraint, error bound --------------------------------------------------------------------------------


@pytest.fixture
def dropped() -> Rotation:
    return _rotation(blocks=50, b=2, module_dropout=0.3).train()


def test_each_block_is_dropped_by_itself_with_the_configured_probability(dropped: Rotation) -> None:
    identity = torch.eye(2)
    full = dropped.matrix().detach()
    counts = torch.zeros(50)
    with torch.no_grad():
        for _ in range(400):
            r_nbb = dropped._matrix_in(torch.float32)
            is_dropped = (r_nbb == identity).all(-1).all(-1)
            assert torch.equal(r_nbb[~is_dropped], full[~is_dropped])
            counts += is_dropped
    rate = counts / 400
    assert float(rate.mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 20000))
    assert float(rate.min()) > 0.15
    assert float(rate.max()) < 0.45


def test_dropped_blocks_get_no_gradient_and_kept_ones_do(dropped: Rotation) -> None:
    r_nbb = dropped._matrix_in(torch.float32)
    is_dropped = (r_nbb.detach() == torch.eye(2)).all(-1).all(-1)
    r_nbb[:, 0, 1].sum().backward()
    assert dropped.weight.grad is not None
    assert torch.equal((dropped.weight.grad == 0).all(-1), is_dropped)


def test_blocks_that_share_a_generator_are_still_dropped_one_by_one() -> None:
    rotation = _rotation(blocks=50, b=2, module_dropout=0.5, block_share=True).train()
    is_dropped = (rotation._matrix_in(torch.float32) == torch.eye(2)).all(-1).all(-1)
    assert 5 < int(is_dropped.sum()) < 45
    assert rotation.eval()._matrix_in(torch.float32).shape == (1, 2, 2)


def test_dropout_rests_in_eval_and_draws_from_the_seed(dropped: Rotation) -> None:
    x = torch.randn(3, 100)
    torch.manual_seed(3)
    first = dropped(x)
    torch.manual_seed(3)
    assert torch.equal(dropped(x), first)
    assert not torch.equal(dropped(x), first)
    dropped.eval()
    torch.testing.assert_close(dropped(x), _expected(dropped, x))


@pytest.mark.parametrize(
    ("options", "radius"),
    [
        ({}, None),
        ({"coft": True, "eps": 1e-3}, 1e-3 * 16 / math.sqrt(3)),
        ({"coft": True, "eps": 1e-3, "coft_radius": "peft"}, 1e-3 / math.sqrt(3)),
        ({"coft": True, "eps": 1e-3, "block_share": True}, 1e-3 * 16),
        ({"max_angle": 10.0}, maths.angle_radius(10.0)),
        ({"max_angle": 10.0, "coft": True}, maths.angle_radius(10.0)),
    ],
)
def test_project_holds_the_ball_the_configuration_names(options: dict[str, Any], radius: float | None) -> None:
    rotation = _rotation(std=1.0, **options)
    before = rotation.weight.detach().clone()
    rotation.project()
    norms = maths.frobenius_norm(rotation.weight.detach())
    if radius is None:
        assert torch.equal(rotation.weight, before)
    else:
        assert bool((norms <= radius).all())
        assert float(norms.max()) == pytest.approx(radius, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_cayley_neumann_terms": 5},
        {"num_cayley_neumann_terms": 2},
        {"neumann_series": "unhalved"},
        {"use_cayley_neumann": False},
    ],
)
def test_error_bound_bounds_the_error(options: dict[str, Any]) -> None:
    for std in (0.0, 1e-3, 0.1, 0.3):
        rotation = _rotation(std=std, **options)
        measured = float(maths.orthogonality_error(rotation.matrix().detach()).max())
        assert measured <= rotation.error_bound() * (1 + 1e-5) + 2e-6


def test_error_bound_is_loud_where_the_series_diverges() -> None:
    assert _rotation(std=2.0).error_bound() > 1
    assert _rotation(std=2.0, use_cayley_neumann=False).error_bound() == 0


def test_gradients_flow_through_a_default_module_twice() -> None:
    rotation = _rotation()
    x = torch.randn(3, 12, requires_grad=True)
    (first,) = torch.autograd.grad(rotation(x).pow(3).sum(), x, create_graph=True)
    first.square().sum().backward()
    assert rotation.weight.grad is not None
    assert bool(rotation.weight.grad.isfinite().all())
