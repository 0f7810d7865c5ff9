"""The maths: every fast path against a plain reference, every derivative against finite differences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor

from lightning_oft import functional as maths
from lightning_oft.functional.geometry import positive_cayley
from lightning_oft.functional.linear import positive_times_inverse

TERMS = range(2, 13)


def _skew(n: int = 3, b: int = 5, norm: float | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    q = maths.skew(torch.randn(n, maths.generator_size(b), dtype=dtype), b)
    return q if norm is None else q * (norm / torch.linalg.matrix_norm(q, 2))[:, None, None]


def _naive_series(q: Tensor, terms: int, halve_last: bool = True) -> Tensor:
    """The series term by term, as PEFT counts them: k = 3 behaves as 4."""
    terms = max(terms, 4) if terms > 2 and halve_last else terms
    total, power = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q).clone(), q
    for exponent in range(1, terms):
        last = exponent == terms - 1 and halve_last and terms > 2
        total = total + (1 if last else 2) * power
        power = power @ q
    return total


def _block_diagonal(r_nbb: Tensor, blocks: int) -> Tensor:
    every = r_nbb if len(r_nbb) == blocks else r_nbb.expand(blocks, -1, -1)
    full: Tensor = torch.block_diag(*every)  # type: ignore[no-untyped-call]
    return full


# ---- generators ------------------------------------------------------------------------------------------------------


def test_block_size_of_inverts_generator_size() -> None:
    assert all(maths.block_size_of(maths.generator_size(b)) == b for b in range(2, 300))


def test_a_size_that_is_no_triangle_is_refused() -> None:
    for size in (2, 4, 5, 7, 495, 497):
        with pytest.raises(ValueError, match=rf"{size} is not b\(b-1\)/2"):
            maths.block_size_of(size)


def test_skew_fills_the_upper_triangle_row_by_row_without_a_half() -> None:
    q = maths.skew(torch.tensor([[1.0, 2.0, 3.0]]), 3)
    assert q.tolist() == [[[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]]


# ---- the two maps ----------------------------------------------------------------------------------------------------


def test_cayley_is_its_formula_and_orthogonal() -> None:
    q = _skew()
    eye = torch.eye(5, dtype=q.dtype)
    torch.testing.assert_close(maths.cayley(q), (eye + q) @ torch.linalg.inv(eye - q))
    assert float(maths.orthogonality_error(maths.cayley(q)).max()) < 1e-13
    torch.testing.assert_close(torch.linalg.det(maths.cayley(q)), torch.ones(3, dtype=q.dtype))


@pytest.mark.parametrize("norm", [0.1, 3.0, 100.0])
def test_what_a_gpu_computes_without_waiting_is_the_same(norm: float) -> None:
    q = _skew(b=8, norm=norm)
    torch.testing.assert_close(positive_cayley(q), maths.cayley(q), rtol=1e-10, atol=1e-10)
    assert float(maths.orthogonality_error(positive_cayley(q.float()).double()).max()) < 5e-7
    outer, r_nbb = torch.randn(3, 8, 8, dtype=torch.float64), maths.cayley_neumann(_skew(b=8, norm=0.8), 6)
    torch.testing.assert_close(positive_times_inverse(outer, r_nbb), outer @ torch.linalg.inv(r_nbb).mT)


def test_the_map_of_a_gpu_is_differentiated_twice() -> None:
    generator = (torch.randn(2, 3, dtype=torch.float64) * 0.5).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda g: positive_cayley(maths.skew(g, 3)), generator)


@pytest.mark.parametrize("halve_last", [True, False])
def test_doubling_equals_the_naive_sum(halve_last: bool) -> None:
    q = _skew(norm=0.7)
    for terms in TERMS:
        torch.testing.assert_close(maths.cayley_neumann(q, terms, halve_last), _naive_series(q, terms, halve_last))


def test_fewer_than_two_terms_are_the_identity() -> None:
    for terms in (0, 1):
        assert torch.equal(maths.cayley_neumann(_skew(), terms), torch.eye(5, dtype=torch.float64).expand(3, 5, 5))


def test_a_truncated_series_is_cayley_times_a_factor() -> None:
    q = _skew(norm=0.6)
    for terms in range(4, 13):
        factor = torch.eye(5, dtype=q.dtype) - torch.linalg.matrix_power(q, terms - 1)
        torch.testing.assert_close(maths.cayley_neumann(q, terms), maths.cayley(q) @ factor)


def test_series_equals_peft() -> None:
    oracle = OFTRotationModule(3, maths.generator_size(5), 5, 15)
    generator = torch.randn(3, maths.generator_size(5)) * 0.1
    for terms in TERMS:
        ours = maths.cayley_neumann(maths.skew(generator, 5), terms)
        torch.testing.assert_close(ours, oracle._cayley_batch(generator, 5, True, terms), rtol=0, atol=2e-6)


def test_pefts_exact_path_is_the_transpose() -> None:
    oracle = OFTRotationModule(3, maths.generator_size(5), 5, 15)
    generator = torch.randn(3, maths.generator_size(5)) * 0.1
    theirs = oracle._cayley_batch(generator, 5, False)
    torch.testing.assert_close(maths.cayley(maths.skew(generator, 5)).mT, theirs, rtol=0, atol=2e-6)
    torch.testing.assert_close(maths.cayley(maths.skew(-generator, 5)), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", [0.05, 0.2, 0.6, 0.95])
def test_series_error_bounds_the_error_and_is_nearly_attained(norm: float) -> None:
    for terms in TERMS:
        measured = float(maths.orthogonality_error(maths.cayley_neumann(_skew(norm=norm), terms)).max())
        bound = maths.series_error(norm, terms)
        assert measured <= bound * (1 + 1e-9) + 1e-14
        assert bound <= max(2.5 * measured, 1e-13)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_series_reach_inverts_series_error(tolerance: float) -> None:
    for terms in TERMS:
        reach = maths.series_reach(terms, tolerance)
        assert maths.series_error(reach, terms) == pytest.approx(tolerance, rel=1e-6)
        assert maths.series_error(reach * 1.01, terms) > tolerance


@pytest.mark.parametrize("halve_last", [True, False])
def test_the_exact_map_turns_as_a_series_does_by_another_generator(halve_last: bool) -> None:
    for terms in range(2, 11):
        reach = maths.series_reach(terms, halve_last=halve_last)
        norms = torch.tensor([0.0, 0.5, 1.0, 3.0, 1e4]) * reach
        g = torch.randn(5, 28)
        g *= (norms / torch.linalg.matrix_norm(maths.skew(g, 8), 2))[:, None]
        exact = maths.exact_generator(g, 8, terms, halve_last)
        series = maths.rotation_of(g[:3].double(), 8, terms, halve_last)
        assert float(maths.orthogonality_error(series).max()) <= maths.SERIES_TOLERANCE * (1 + 1e-5)
        turned = maths.rotation_of(exact[:3].double(), 8, None)
        assert float(torch.linalg.matrix_norm(turned - series, 2).max()) < 0.6 * maths.SERIES_TOLERANCE
        assert torch.equal(exact[0], g[0])
        moved = torch.linalg.matrix_norm(maths.skew((exact - g).double(), 8), 2) / (1e-7 * norms + reach ** (terms - 1))
        assert float(moved.max()) < 1.0  # also beyond the reach, where the series is no rotation


@pytest.mark.parametrize("by_formula", [True, False])
def test_the_exact_map_is_orthogonal_in_float32_however_far_it_turns(by_formula: bool) -> None:
    for norm in (0.01, 1.0, 10.0, 100.0):
        for b in (4, 16, 64):
            q = _skew(24, b, norm, torch.float32)
            rows, columns = torch.triu_indices(b, b, 1)
            r_nbb = maths.cayley(q) if by_formula else maths.rotation_of(q[:, rows, columns], b, None)
            assert float(maths.orthogonality_error(r_nbb.double()).max()) <= maths.SERIES_TOLERANCE


def test_series_error_grows_without_overflow_and_the_identity_has_none() -> None:
    assert maths.series_error(1e9, 12) == math.inf
    assert maths.series_error(5.0, 1) == maths.series_error(0.0, 2) == maths.series_error(0.0, 6) == 0.0
    assert maths.series_reach(1) == math.inf


# ---- derivatives, once and twice -------------------------------------------------------------------------------------


def _generator(n: int = 2, b: int = 4) -> Tensor:
    return (torch.randn(n, maths.generator_size(b), dtype=torch.float64) * 0.3).requires_grad_()


def _exact(generator: Tensor) -> Tensor:
    return maths.cayley(maths.skew(generator, 4))


def _rotated(x: Tensor, generator: Tensor) -> Tensor:
    return maths.rotate(x, _exact(generator))


def test_gradcheck_of_cayley_for_any_matrix() -> None:
    q = (torch.randn(2, 3, 3, dtype=torch.float64) * 0.2).requires_grad_()
    assert torch.autograd.gradcheck(maths.cayley, q)
    assert torch.autograd.gradgradcheck(maths.cayley, q)


def test_gradcheck_of_the_series() -> None:
    for terms in (2, 5, 6):
        assert torch.autograd.gradcheck(lambda g, k=terms: maths.cayley_neumann(maths.skew(g, 4), k), _generator())


@pytest.mark.parametrize("shape", [(8,), (2, 2, 8)])
@pytest.mark.parametrize("blocks", [2, 1], ids=["blocks", "shared"])
def test_gradcheck_of_rotate(shape: tuple[int, ...], blocks: int) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    r = torch.randn(blocks, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(maths.rotate, (x, r))
    assert torch.autograd.gradgradcheck(maths.rotate, (x, r))
    assert torch.autograd.gradcheck(_rotated, (x, _generator(blocks)))
    assert torch.autograd.gradgradcheck(_rotated, (x, _generator(blocks)))


def test_the_gradient_of_cayley_equals_that_of_the_solve() -> None:
    generator = _generator()
    upstream = torch.randn(2, 4, 4, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    q = maths.skew(generator, 4)
    (plain,) = torch.autograd.grad(((eye + q) @ torch.linalg.inv(eye - q) * upstream).sum(), generator)
    (ours,) = torch.autograd.grad((_exact(generator) * upstream).sum(), generator)
    torch.testing.assert_close(ours, plain)


# ---- rotate ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.booleans(), st.lists(st.integers(0, 3), max_size=3), st.booleans())
def test_rotate_is_the_product_with_the_block_diagonal(
    n: int, b: int, shared: bool, leading: list[int], grad: bool
) -> None:
    x = torch.randn(*leading, n * b, dtype=torch.float64, requires_grad=grad)
    r = torch.randn(1 if shared else n, b, b, dtype=torch.float64)
    rotated = maths.rotate(x, r)
    assert rotated.shape == x.shape
    torch.testing.assert_close(rotated, x @ _block_diagonal(r, n))


LAYOUTS = {
    "transposed": lambda: torch.randn(12, 5).t(),
    "permuted": lambda: torch.randn(12, 2, 5).permute(1, 2, 0),
    "expanded": lambda: torch.randn(1, 12).expand(5, 12),
    "sliced": lambda: torch.randn(5, 24)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotate_reads_any_memory_layout(layout: str) -> None:
    for blocks in (3, 1):
        x, r = LAYOUTS[layout]().requires_grad_(), torch.randn(blocks, 4, 4, requires_grad=True)
        upstream = torch.randn(x.shape[::-1]).permute(*reversed(range(x.dim())))
        rotated, plain = maths.rotate(x, r), x @ _block_diagonal(r, 3)
        torch.testing.assert_close(rotated, plain)
        ours, reference = (torch.autograd.grad(output, (x, r), upstream) for output in (rotated, plain))
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_a_fan_in_that_does_not_fit_is_refused() -> None:
    for shape, blocks in (((3, 14), 1), ((), 3), ((3, 0), 1), ((3, 24), 3)):
        with pytest.raises(ValueError, match="last dimension must be"):
            maths.rotate(torch.zeros(shape), torch.zeros(blocks, 4, 4))


def test_rotate_keeps_x_and_r_for_backward_and_nothing_else() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, r = torch.randn(6, 12, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maths.rotate(x, r)
    assert sorted(tensor.data_ptr() for tensor in kept) == sorted([x.data_ptr(), r.data_ptr()])


@pytest.fixture
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads torch uses."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _operators(action: Callable[[], Any]) -> dict[str, int]:
    with torch.profiler.profile() as profile:
        action()
    return {event.key: event.count for event in profile.key_averages()}


@pytest.mark.parametrize("cores", [1, 2], indirect=True)
@pytest.mark.parametrize(
    ("n", "b", "rows", "fewest_cores"),
    [(24, 32, 1364, 1), (37, 5, 5665, 1), (24, 32, 1361, 2), (300, 32, 14, 2), (3, 256, 1364, 3)],
    ids=["fours", "fives", "prime", "few", "large blocks"],
)
def test_little_blocks_rotate_a_large_input_as_channels_of_images(
    n: int, b: int, rows: int, fewest_cores: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maths.products, "_SMALL_ON_CPU", 0)
    x = torch.randn(1, rows, n * b, requires_grad=True)
    r_nbb, upstream = torch.randn(n, b, b).div_(b**0.5).requires_grad_(), torch.randn_like(x)
    found: list[Tensor] = []
    counts = _operators(lambda: found.extend(_with_gradients(maths.rotate(x, r_nbb), (x, r_nbb), upstream)))
    is_x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert counts.get("aten::convolution", 0) == (2 if cores >= fewest_cores and is_x86 else 0)
    assert not counts.keys() & {"aten::clone", "aten::_slow_conv2d_forward"}
    exact = [one.detach().double().requires_grad_() for one in (x, r_nbb)]
    plain = torch.einsum("stnb,nbc->stnc", exact[0].unflatten(2, (n, b)), exact[1]).flatten(2)
    for ours, reference in zip(found, _with_gradients(plain, exact, upstream.double()), strict=True):
        assert ours.is_contiguous()
        assert float((ours - reference).norm() / reference.norm()) < 1e-5  # of float32
    with torch.no_grad():
        turned = x.transpose(0, 1)  # others than rows in order are taken as they lie
        torch.testing.assert_close(maths.rotate(turned, r_nbb).transpose(0, 1), found[0])


def _with_gradients(output: Tensor, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("cores", [1, 2], indirect=True)
@pytest.mark.parametrize(
    ("rows", "n", "way"),
    [(1368, 24, ""), (1373, 24, "prime"), (512, 72, "few"), (1368, 24, "by columns"), (1368, 24, "recorded")],
)
def test_the_gradient_of_r_is_summed_up_over_images_of_many_rows(rows: int, n: int, way: str, cores: int) -> None:
    r_nbb = torch.randn(n, 32, 32, requires_grad=True)
    x, upstream = torch.randn(2, rows, n * 32).unbind()
    if way == "by columns":
        upstream = upstream.mT.contiguous().mT
    y = maths.rotate(x, r_nbb)
    found: list[Tensor] = []
    counts = _operators(lambda: found.extend(torch.autograd.grad(y, r_nbb, upstream, create_graph=way == "recorded")))
    is_summed = not way and torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert counts.get("aten::convolution_backward", 0) == is_summed
    expected = torch.einsum("tnb,tnc->nbc", *(one.double().unflatten(1, (n, 32)) for one in (x, upstream)))
    assert float((found[0] - expected).norm() / expected.norm()) < 5e-6  # of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_weight", [False, True], ids=["input", "weight"])
@pytest.mark.parametrize("terms", [6, None])
def test_several_gradients_at_once_are_those_of_each(terms: int | None, by_weight: bool, dtype: torch.dtype) -> None:
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them; of convolutions, and of products in float64."""
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((2, 1368, 384), (64, 384), (64,)))
    inputs = [one.requires_grad_() for one in (x, 0.1 * torch.randn(24, 120, dtype=dtype), bias)]
    r_nbb = maths.rotation_of(inputs[1], 16, terms)
    turned = maths.rotated_linear(x, r_nbb, weight, bias) if by_weight else maths.rotate(x, r_nbb)[..., :64] + bias
    upstream = torch.randn(3, *turned.shape, dtype=dtype)
    found = torch.autograd.grad(turned, inputs, upstream, retain_graph=True, is_grads_batched=True)
    for k, one in enumerate(upstream):
        expected = torch.autograd.grad(turned, inputs, one, retain_graph=True)
        for ours, reference in zip(found, expected, strict=True):
            assert float((ours[k] - reference).norm() / reference.norm()) < (1e-5 if dtype is torch.float32 else 1e-12)


def test_a_product_by_columns_is_that_by_rows() -> None:
    x, r_nbb = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 12), (3, 4, 4)))
    weight = torch.randn(5, 12, dtype=torch.float64)
    assert "aten::copy_" not in _operators(lambda: maths.rotate_by_columns(x, r_nbb))
    outputs = [rotate(x, r_nbb) for rotate in (maths.rotate_by_columns, maths.rotate)]
    assert [output.is_contiguous() for output in outputs] == [False, True]
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    ours, theirs = (_with_gradients(F.linear(y, weight), (x, r_nbb), upstream) for y in outputs)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(maths.rotate_by_columns, (x, r_nbb))
    assert torch.autograd.gradgradcheck(maths.rotate_by_columns, (x, r_nbb))


BY_ROWS = {"a single thread": {"cores": 1}, "few rows": {"shape": (63, 12)}, "an odd fan-out": {"fan_out": 80},
           "a small fan-out": {"fan_out": 32}, "another precision": {"dtype": torch.float64}, "many entries of R": {"block": 2**13},
           "a transposed input": {"turned": True}, "another fan-in": {"shape": (2, 40, 11)},
           "a bias that is added later": {"bias": True}}  # fmt: skip


@pytest.mark.parametrize(
    "changed", [{}, {"shape": (64, 12), "bias": True}, *BY_ROWS.values()], ids=["3-D", "2-D", *BY_ROWS]
)
def test_an_input_lies_by_columns_where_that_is_cheaper_and_changes_no_bit_of_a_product(
    changed: dict[str, Any],
) -> None:
    case: dict[str, Any] = {"cores": 2, "shape": (2, 40, 12), "fan_out": 96, "block": 4, "dtype": None} | changed
    x, weight = torch.randn(case["shape"], dtype=case["dtype"]), torch.randn(case["fan_out"], 12, dtype=case["dtype"])
    bias = torch.randn(case["fan_out"]) if "bias" in case else None
    before = torch.get_num_threads()
    torch.set_num_threads(case["cores"])
    try:
        given = x.mT.contiguous().mT if "turned" in case else x
        found = maths.columns_are_cheaper(given, weight, bias, case["block"])
        assert found == (changed not in BY_ROWS.values() and torch.backends.mkl.is_available())
        if found:
            by_columns = maths.rotate_by_columns(x, torch.eye(4).repeat(3, 1, 1))
            assert torch.equal(F.linear(by_columns, weight, bias), F.linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)


def test_rotate_is_untouched_by_autocast_also_backward() -> None:
    x, r = torch.randn(6, 12, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    plain = maths.rotate(x, r)
    expected = torch.autograd.grad(plain.square().sum(), (x, r))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotated = maths.rotate(x, r)
        assert torch.equal(rotated, plain)
        for ours, reference in zip(torch.autograd.grad(rotated.square().sum(), (x, r)), expected, strict=True):
            assert torch.equal(ours, reference)


def test_a_backward_by_columns_is_untouched_by_autocast() -> None:
    x, r = torch.randn(6, 12, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    expected = torch.autograd.grad(maths.rotate(x, r).sum(), (x, r))
    total = maths.rotate_by_columns(x, r).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(total, (x, r)), expected)


def test_shapes_are_known_on_the_meta_device() -> None:
    assert maths.rotate(torch.empty(2, 12, device="meta"), torch.empty(3, 4, 4, device="meta")).shape == (2, 12)
    assert maths.cayley(maths.skew(torch.empty(3, 6, device="meta"), 4)).shape == (3, 4, 4)


@pytest.mark.parametrize("cores", [1, 2], indirect=True)
def test_rows_of_a_large_weight_are_rotated_as_images(cores: int) -> None:
    weight, r_nbb = torch.randn(128, 3072), maths.cayley(_skew(96, 32, norm=0.5)).float()
    kept = torch.empty(128, 3072, dtype=torch.bfloat16)
    counts = _operators(lambda: maths.rotate_weight(weight, r_nbb, out=kept))
    is_x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert counts.get("aten::convolution", 0) == (1 if is_x86 else 0)
    plain = (weight.double().view(128, 96, 1, 32) @ r_nbb.double().mT).view(128, 3072)
    torch.testing.assert_close(kept, plain.bfloat16(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(maths.rotate_weight(weight, r_nbb, out=weight), plain.float())


@pytest.mark.parametrize("blocks", [3, 1], ids=["blocks", "shared"])
def test_rotate_weight_is_what_rotated_inputs_would_do(blocks: int) -> None:
    x, weight = torch.randn(5, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    r = maths.cayley(_skew(blocks, 4))
    torch.testing.assert_close(x @ maths.rotate_weight(weight, r).T, maths.rotate(x, r) @ weight.T)
    torch.testing.assert_close(maths.rotate_weight(maths.rotate_weight(weight, r), maths.inverse(r)), weight)
    in_place = weight.clone()
    assert torch.equal(maths.rotate_weight(in_place, r, out=in_place), maths.rotate_weight(weight, r))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(maths.rotate_weight(weight.float(), r.float()), maths.rotate(weight.float(), r.float().mT))


def test_the_inverse_undoes_where_a_transpose_would_not() -> None:
    weight, r = torch.randn(7, 12), maths.cayley_neumann(_skew(3, 4, norm=0.8, dtype=torch.float32), 5)
    merged = maths.rotate_weight(weight, r)
    inverse = maths.inverse(r)
    assert inverse.dtype == torch.float64
    torch.testing.assert_close(maths.rotate_weight(merged, inverse.float()), weight, rtol=1e-5, atol=1e-5)
    assert float((maths.rotate_weight(merged, r.mT) - weight).norm() / weight.norm()) > 1e-2


# ---- constraint, error, angle ----------------------------------------------------------------------------------------


def test_frobenius_norm_is_that_of_the_skew_matrix() -> None:
    generator = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(
        maths.frobenius_norm(generator), torch.linalg.matrix_norm(maths.skew(generator, 5), "fro")
    )


def test_the_paper_radius_has_b_squared_and_pefts_has_not() -> None:
    assert maths.eps_radius(6e-5, 32, 24) == pytest.approx(6e-5 * 1024 / math.sqrt(24))
    assert maths.largest_angle(maths.eps_radius(6e-5, 32, 24)) == pytest.approx(1.016, abs=0.001)


@pytest.mark.parametrize(("angle", "b"), [(0.1, 8), (45.0, 3), (170.0, 2)])
def test_no_plane_turns_further_than_max_angle_and_one_can_reach_it(angle: float, b: int) -> None:
    radius = maths.angle_radius(angle)
    assert maths.largest_angle(radius) == pytest.approx(angle)
    generator = torch.randn(50, maths.generator_size(b), dtype=torch.float64)
    generator *= (radius / maths.frobenius_norm(generator))[:, None]
    assert float(maths.rotation_angle(maths.cayley(maths.skew(generator, b))).max()) <= angle * (1 + 1e-9)
    single = torch.zeros(1, maths.generator_size(b), dtype=torch.float64)
    single[0, 0] = radius / math.sqrt(2)
    assert float(maths.rotation_angle(maths.cayley(maths.skew(single, b)))) == pytest.approx(angle)


def test_project_pulls_in_what_is_outside_and_leaves_what_is_inside() -> None:
    dtype = torch.float32
    generator = torch.randn(6, 10, dtype=dtype) * torch.tensor([1e-9, 1e-3, 0.02, 1.0, 30.0, 0.0], dtype=dtype)[:, None]
    before, radius = generator.clone(), 0.1
    inside = maths.frobenius_norm(before) <= radius
    address = generator.data_ptr()
    assert maths.project(generator, radius).data_ptr() == address
    assert inside.any()
    assert not inside.all()
    assert torch.equal(generator[inside], before[inside])
    norms = maths.frobenius_norm(generator)[~inside]
    assert bool((norms <= radius).all())
    assert bool((norms >= radius * (1 - 2e-6)).all())
    torch.testing.assert_close(
        torch.nn.functional.normalize(generator[~inside]), torch.nn.functional.normalize(before[~inside])
    )
    once = generator.clone()
    assert torch.equal(maths.project(generator, radius), once)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 10), st.floats(1e-3, 1e4), st.integers(2, 33), st.integers(0, 10**6))
def test_projecting_twice_changes_nothing(radius: float, scale: float, b: int, seed: int) -> None:
    generator = torch.randn(4, maths.generator_size(b), generator=torch.Generator().manual_seed(seed)) * scale
    once = maths.project(generator, radius).clone()
    assert torch.equal(maths.project(generator, radius), once)
    assert bool((maths.frobenius_norm(once) <= radius * (1 + 1e-7)).all())


@pytest.mark.parametrize("together", [True, False])
def test_several_generators_are_measured_and_projected_as_each_by_itself(
    together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maths.geometry, "_is_told", lambda _: together)
    monkeypatch.setattr(maths.geometry, "_TOGETHER", 40)  # so that those of one size lie in more than one tensor
    sizes = [(3, 10), (1, 10), (2, 6), (5, 10), (0, 10)]
    generators = [torch.randn(size) * 0.2 for size in sizes]
    apart = [maths.project(one.clone(), 0.5) for one in generators]
    norms = [float(maths.frobenius_norm(one).max()) if len(one) else 0.0 for one in generators]
    assert maths.largest_norms(generators).tolist() == pytest.approx(norms, rel=1e-6)
    maths.project_all(generators, 0.5)
    torch.testing.assert_close(generators, apart, rtol=0, atol=0)
    generators[1][0, 3] = torch.nan
    assert maths.largest_norms(generators)[1] == math.inf


def test_project_does_not_record_and_works_on_a_parameter() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 6))
    assert maths.project(parameter, 0.5).grad_fn is None
    assert float(maths.frobenius_norm(parameter).detach().max()) <= 0.5
    counted = parameter._version
    assert maths.project(parameter, 0.5)._version == counted  # nothing to do, and no backward that waits is disturbed


def test_rotation_angle_of_a_known_turn() -> None:
    turn = math.radians(30)
    r = torch.tensor([[[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]])
    assert float(maths.rotation_angle(r)) == pytest.approx(30, abs=1e-4)
    assert float(maths.rotation_angle(-torch.eye(2)[None])) == pytest.approx(180)
    assert float(maths.rotation_angle(torch.eye(4)[None])) == 0


@pytest.mark.parametrize("terms", [6, None])
@pytest.mark.parametrize("sizes", [(3,), (2, 1, 4)])
def test_one_map_for_several_generators_is_the_plain_formula(sizes: tuple[int, ...], terms: int | None) -> None:
    generators = [(0.2 * torch.randn(n, 10, dtype=torch.float64)).requires_grad_() for n in sizes]

    def one(*own: Tensor) -> tuple[Tensor, ...]:
        return tuple(maths.rotations_of(own, 5, terms, torch.float64))

    for r_nbb, generator in zip(one(*generators), generators, strict=True):
        q_nbb = maths.skew(generator, 5)
        plain = maths.cayley(q_nbb) if terms is None else maths.cayley_neumann(q_nbb, terms)
        torch.testing.assert_close(r_nbb, plain, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(one, generators)
    assert torch.autograd.gradgradcheck(one, generators)


def test_a_generator_that_reaches_no_loss_gets_no_gradient() -> None:
    used, unused = (torch.zeros(2, 10, requires_grad=True) for _ in range(2))
    maths.rotations_of([used, unused], 5, 6, torch.float32)[0].sum().backward()
    assert used.grad is not None
    assert unused.grad is None


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(2, 7), st.integers(1, 6), st.booleans(), st.booleans())
def test_a_rotated_weight_is_a_rotated_input(t: int, n: int, b: int, o: int, shared: bool, exact: bool) -> None:
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((t, n * b), (o, n * b), (o,)))
    generator = 0.1 * torch.randn(1 if shared else n, maths.generator_size(b), dtype=torch.float64)
    inputs = [x.requires_grad_(), maths.rotation_of(generator, b, None if exact else 6).requires_grad_()]
    fast = maths.rotated_linear(*inputs, weight, bias)
    plain = torch.nn.functional.linear((x.reshape(t, -1, 1, b) @ inputs[1]).reshape(t, -1), weight, bias)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    upstream = torch.randn_like(fast)
    for ours, theirs in zip(
        torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="measured with MKL")
@pytest.mark.parametrize("cores", [2], indirect=True)
def test_a_small_weight_is_rotated_by_columns_and_begins_to_the_bit(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maths.linear, "product", None)  # by rows
    x, weight, bias = torch.randn(2, 80, 12), torch.randn(64, 12), torch.randn(64)
    assert torch.equal(maths.rotated_linear(x, torch.eye(4).repeat(3, 1, 1), weight, bias), F.linear(x, weight, bias))
    inputs = [x.requires_grad_(), torch.randn(3, 4, 4).div_(2).requires_grad_()]
    upstream = torch.randn(2, 80, 64)
    found = _with_gradients(maths.rotated_linear(*inputs, weight, bias), inputs, upstream)
    exact = [one.detach().double().requires_grad_() for one in inputs]
    plain = F.linear(maths.rotate(*exact), weight.double(), bias.double())
    for ours, reference in zip(found, _with_gradients(plain, exact, upstream.double()), strict=True):
        assert float((ours - reference).norm() / reference.norm()) < 1e-5


@pytest.mark.parametrize(("dtype", "bound", "nearly"), [(torch.float32, 5e-6, 5e-6), (torch.float64, 1e-12, 0.0)])
@pytest.mark.parametrize("off", [0.0, 5e-6, 0.1], ids=["a rotation", "nearly one", "none"])
def test_the_gradient_of_r_by_way_of_a_rotated_weight_is_right_for_any_r(
    off: float, dtype: torch.dtype, bound: float, nearly: float
) -> None:
    """Without its correction Newton's step would be off by more than the bound; float64 takes none but for a rotation."""
    x, weight = torch.randn(9, 24, dtype=dtype), torch.randn(7, 24, dtype=dtype)
    r_nbb = (maths.cayley(_skew(b=8, norm=1.0)) + off * torch.randn(3, 8, 8, dtype=torch.float64)).to(dtype)
    r_nbb = r_nbb.requires_grad_()
    upstream = torch.randn(9, 7, dtype=dtype)
    found: list[Tensor] = []
    y = maths.rotated_linear(x.clone().requires_grad_(), r_nbb, weight)
    counts = _operators(lambda: found.extend(torch.autograd.grad(y, r_nbb, upstream)))
    assert ("aten::linalg_solve_ex" in counts) == (off > nearly)
    (ours,) = found
    through = (upstream.double() @ weight.double()).view(9, 3, 8)
    expected = torch.einsum("tnb,tnc->nbc", x.double().view(9, 3, 8), through)
    assert float((ours - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("terms", [6, None])
@pytest.mark.parametrize("size", [0.02, 0.06, 0.3], ids=["near", "farther", "far"])
def test_the_inverses_of_one_map_are_computed_once_for_all(size: float, terms: int | None) -> None:
    """The exact map's are rotations, and so is the series near I; far, LAPACK inverts it."""
    generators = [(size * torch.randn(n, 28)).requires_grad_() for n in (2, 3, 1)]
    xs, weights = ([torch.randn(t, 8 * n) for n in (2, 3, 1)] for t in (9, 7))
    upstream = torch.randn(9, 7)
    *turned, _ = maths.rotations_of(generators, 8, terms, torch.float32)  # the last one reaches no loss
    outputs = [maths.rotated_linear(x.requires_grad_(), r, w) for x, r, w in zip(xs, turned, weights, strict=False)]
    found: list[Tensor] = []
    step = functools.partial(torch.autograd.grad, outputs, generators[:2], [upstream] * 2)
    counts = _operators(lambda: found.extend(step(retain_graph=True)))
    inverted = [counts.get(f"aten::{name}", 0) for name in ("aminmax", "linalg_inv_ex")]
    assert inverted == ([0, 0] if terms is None or size == 0.02 else [1, size == 0.3])
    exact = [generator.detach().double().requires_grad_() for generator in generators[:2]]
    plain = []
    for x, generator, weight in zip(xs, exact, weights, strict=False):
        q = maths.skew(generator, 8)
        r_nbb = maths.cayley(q) if terms is None else maths.cayley_neumann(q, terms)
        blocks = x.detach().double().view(9, -1, 1, 8) @ r_nbb
        plain.append(blocks.reshape(9, -1) @ weight.double().mT)
    expected = torch.autograd.grad(plain, exact, [upstream.double()] * 2)
    for ours, theirs in zip((*found, *step()), (*expected, *expected), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-5  # of float32


def test_a_rotated_weight_is_differentiated_twice() -> None:
    weight = torch.randn(3, 8, dtype=torch.float64)
    x, bias = (
        torch.randn(2, 8, dtype=torch.float64).requires_grad_(),
        torch.randn(3, dtype=torch.float64).requires_grad_(),
    )
    r_nbb = maths.rotation_of(0.2 * torch.randn(2, 6, dtype=torch.float64), 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda *own: maths.rotated_linear(own[0], own[1], weight, own[2]), (x, r_nbb, bias))
    assert torch.autograd.gradgradcheck(
        lambda *own: maths.rotated_linear(own[0], own[1], weight, own[2]), (x, r_nbb, bias)
    )
