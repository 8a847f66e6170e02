"""linear_scan under PyTorch's transforms is linear_scan."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cleanrl_memoroid import scan_op
from cleanrl_memoroid.scan import linear_scan

COMPLEX = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])


def arguments(dtype=torch.float32, steps=37, per_step=False):
    generator = torch.Generator().manual_seed(steps)
    decay = torch.rand(*[steps] * per_step, 6, generator=generator).to(dtype)
    x, h0 = torch.randn(steps, 6, generator=generator, dtype=dtype), torch.randn(6, generator=generator, dtype=dtype)
    return decay, x, torch.rand(steps, generator=generator) < 0.2, h0


def loss(decay, x, begins, h0):
    return linear_scan(decay, x, begins, h0).abs().pow(2).sum()


def gradients(f, decay, x, begins, h0):
    leaves = [v.clone().requires_grad_() for v in (decay, x, h0)]
    return torch.autograd.grad(f(leaves[0], leaves[1], begins, leaves[2]), leaves)


@COMPLEX
@pytest.mark.parametrize("per_step", [False, True])
def test_compiled(dtype, per_step):
    args = arguments(dtype, per_step=per_step)
    compiled = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), linear_scan(*args))
    assert torch.equal(compiled(0.5, args[1]), linear_scan(0.5, args[1]))
    for one, other in zip(gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), *args), gradients(loss, *args)):
        torch.testing.assert_close(one, other)


def test_exported_and_fake():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decay = torch.nn.Parameter(arguments()[0])

        def forward(self, x, begins):
            return linear_scan(self.decay, x, begins)

    _, x, begins, _ = arguments()
    torch.testing.assert_close(torch.export.export(Model(), (x, begins)).module()(x, begins), Model()(x, begins))
    with FakeTensorMode() as mode:
        decay, x, begins, h0 = (mode.from_tensor(v) for v in arguments())
        assert linear_scan(decay[:, None], x[:, :, None].expand(-1, -1, 2), begins).shape == (37, 6, 2)
        with pytest.raises(ValueError, match="begins: expected a bool tensor"):
            linear_scan(decay, x, begins.int())


@COMPLEX
@pytest.mark.parametrize("per_step", [False, True])
def test_func_grad(dtype, per_step):
    decay, x, begins, h0 = arguments(dtype, per_step=per_step)
    found = torch.func.grad(lambda *leaves: loss(leaves[0], leaves[1], begins, leaves[2]), (0, 1, 2))(decay, x, h0)
    for one, other in zip(found, gradients(loss, decay, x, begins, h0)):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batched", [(1,), (0, 1), (0, 1, 2, 3), (2,)])
def test_vmap_over_any_argument_also_of_gradients(batched):
    many = [arguments(), *(tuple(v.roll(k, 0) for v in arguments()) for k in (1, 2))]
    args = [torch.stack([a[i] for a in many]) if i in batched else many[0][i] for i in range(4)]
    dims = tuple(0 if i in batched else None for i in range(4))
    ones = [[a[k] if i in batched else a for i, a in enumerate(args)] for k in range(3)]
    torch.testing.assert_close(torch.func.vmap(linear_scan, dims)(*args), torch.stack([linear_scan(*one) for one in ones]))
    grad = torch.func.grad(loss, (0, 1, 3))
    for found, expected in zip(torch.func.vmap(grad, dims)(*args), zip(*(grad(*one) for one in ones))):
        torch.testing.assert_close(found, torch.stack(expected))


def test_the_operator_keeps_pytorch_s_rules():
    decay, x, begins, h0 = arguments()
    leaves = decay.requires_grad_(), x.requires_grad_(), begins, h0.requires_grad_(), True, "auto"
    torch.library.opcheck(scan_op.linear_scan, leaves)


def test_what_is_not_supported_says_so():
    decay, x, begins, h0 = arguments()
    with pytest.raises(RuntimeError, match="linear_scan: cannot be differentiated twice; use backend='ref'"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: loss(decay, x, begins, h0))(x).sum())(x)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: linear_scan(decay, x), (x,), (x,))


@pytest.mark.parametrize("backend", ["auto", "torch", "ref"])
@pytest.mark.parametrize("shape", [(5, 0), (5, 2, 0), (1, 0)])
def test_no_channels_are_none(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    out = linear_scan(torch.rand(0), x, torch.zeros(len(x), dtype=torch.bool), backend=backend)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape
