"""The residual block of the published fuser, whose backward pass is written by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from c2c.fusers.residual import ResidualBlock, draw_kept, residual
from torch.nn import functional

from c2c.errors import FuserError
from c2c.fusers import C2CFuser
from c2c.kv_cache import KVGeometry

WIDTH, INNER = 8, 12


def arguments(dtype=torch.float64, rows=(2, 5)):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, WIDTH), (WIDTH,), (INNER, WIDTH), (WIDTH, INNER)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def plain(x, norm, w1, w2, eps=1e-6):
    """The block as autograd would have it."""
    inner = functional.linear(functional.rms_norm(x, (WIDTH,), norm, eps), w1)
    return x + functional.linear(functional.gelu(inner), w2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_backward_pass_is_the_derivative(dropout):
    def block(*tensors):
        torch.manual_seed(1)  # the same elements are dropped at every call
        return residual(*tensors, dropout)

    assert torch.autograd.gradcheck(block, arguments())


@pytest.mark.parametrize("rows", [(5,), (2, 5), (2, 3, 5)])
def test_it_computes_what_its_modules_say(rows):
    mine, theirs = arguments(torch.float32, rows), arguments(torch.float32, rows)
    out, expected = residual(*mine), plain(*theirs)
    torch.testing.assert_close(out, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    for value in (out, expected):
        (value * weight).sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_block_in_training_is_the_one_of_inference():
    torch.manual_seed(0)
    block = ResidualBlock(WIDTH, INNER, dropout=0.0)
    torch.nn.init.normal_(block.norm.weight)
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(block.train()(x), block.eval()(x))
    dropping = ResidualBlock(WIDTH, INNER, dropout=0.5)
    dropping.load_state_dict(block.state_dict())
    torch.testing.assert_close(dropping.eval()(x), block(x), rtol=0, atol=0)
    assert not torch.allclose(dropping.train()(x), block(x))


def test_under_autocast_products_are_rounded_and_gradients_are_not():
    exact, near = arguments(torch.float32, (64,)), arguments(torch.float32, (64,))
    residual(*exact).square().sum().backward()
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")  # nn.RMSNorm warns of mixed types
        out = residual(*near)
    out.square().sum().backward()
    for one, other in zip(near, exact, strict=True):
        assert one.grad.dtype == torch.float32
        assert 0 < (one.grad - other.grad).norm() < 0.02 * other.grad.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_it_keeps_less_than_half_of_what_autograd_would(autocast):
    """Also no rounded copy of a weight, which autocast would keep until the step ends."""
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    def bytes_of(block, tensors):
        kept.clear()
        own = {tensor.data_ptr() for tensor in tensors}
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            block(*tensors)
        return sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in own)

    tensors = arguments(torch.float32, (64,))
    assert 0 < bytes_of(residual, tensors) < 0.5 * bytes_of(plain, tensors)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(share):
    torch.manual_seed(0)
    kept, scale = draw_kept(torch.empty(1001, 1003), share)
    assert kept.unique().tolist() == [0.0, 1.0]
    mean = float(kept.double().mean())
    assert mean == pytest.approx(1 - share, abs=0.002)  # four deviations
    assert mean * scale == pytest.approx(1, abs=0.02)
    for step in (1, 2, 3, 4):  # elements that shared a draw are independent
        both = (kept.flatten()[:-step] * kept.flatten()[step:]).double().mean()
        assert float(both) == pytest.approx((1 - share) ** 2, abs=0.003)


def test_dropout_follows_the_seed():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(draw_kept(torch.empty(50, 50), 0.2)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draw_kept(torch.empty(3), 0.0) == (None, 1.0)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_impossible_dropout_is_refused(dropout):
    with pytest.raises(FuserError, match="from 0 to below 1"):
        C2CFuser.from_geometry(KVGeometry(1, 1, 4), KVGeometry(1, 1, 4), [0], dropout=dropout)
