"""`linear_scan` as one operator for PyTorch's transforms: torch.compile, torch.export, fake tensors, torch.func.

`linear_scan` calls it where such a transform is at work, and nowhere else, as an operator costs more time per call. Its
gradient can be taken once; forward-mode differentiation is not supported.
"""

import torch
import torch.nn as nn

PLAIN = torch.Tensor, nn.Parameter
TWICE = "linear_scan: cannot be differentiated twice; use backend='ref' or associative_scan for second derivatives"


def transformed(*tensors):
    """Is a transform at work: a compiler, one of torch.func, or tensors of another class, such as fake ones?"""
    if torch.compiler.is_compiling() or _in_torch_func():
        return True
    return any(isinstance(v, torch.Tensor) and type(v) not in PLAIN for v in tensors)


def _in_torch_func():
    return torch._C._functorch.peek_interpreter_stack() is not None  # there is no public way to ask


def call(*args):
    """`linear_scan`, by the way that the transform at work takes."""
    return ForTorchFunc.apply(*args) if not torch.compiler.is_compiling() and _in_torch_func() else linear_scan(*args)


ARGUMENTS = "Tensor decay, Tensor x, Tensor? begins, Tensor? h0"


@torch.library.custom_op(
    "cleanrl_memoroid::linear_scan", mutates_args=(), schema=f"({ARGUMENTS}, bool reverse, str backend) -> Tensor"
)
def linear_scan(decay, x, begins, h0, reverse, backend):
    """As cleanrl_memoroid.scan.linear_scan."""
    from cleanrl_memoroid import scan

    with torch.no_grad():
        return scan.linear_scan(decay, x, begins, h0, reverse, backend).clone()


@linear_scan.register_fake
def _(decay, x, begins, h0, reverse, backend):
    from cleanrl_memoroid import scan

    return x.new_empty(len(x), *scan._check(decay, x, begins, h0)[1])


@torch.library.custom_op(
    "cleanrl_memoroid::linear_scan_backward",
    mutates_args=(),
    schema=f"({ARGUMENTS}, Tensor grad_out, bool reverse, str backend) -> (Tensor, Tensor, Tensor)",
)
def linear_scan_backward(decay, x, begins, h0, grad_out, reverse, backend):
    """Gradients of decay, x and h0; of h0, an empty tensor where there is none. Runs the scan again, and so saves no rows."""
    from cleanrl_memoroid import scan

    with torch.no_grad():
        grads = scan._gradients(decay, x, begins, h0, grad_out, reverse, backend)
    grads = [g.sum_to_size(v.shape).to(v.dtype).contiguous() for g, v in zip(grads, (decay, x, h0)) if v is not None]
    return tuple(grads) if h0 is not None else (*grads, x.new_empty(0))


@linear_scan_backward.register_fake
def _(decay, x, begins, h0, grad_out, reverse, backend):
    return torch.empty_like(decay), torch.empty_like(x), x.new_empty(0 if h0 is None else h0.shape)


def setup_context(ctx, inputs, output):
    decay, x, begins, h0, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(decay, x, begins, h0)


def backward(ctx, grad_out):
    decay, x, begins, h0 = ctx.saved_tensors
    gradients = GradientsForTorchFunc.apply if _in_torch_func() else linear_scan_backward
    grads = gradients(decay, x, begins, h0, grad_out, ctx.reverse, ctx.backend)
    return grads[0], grads[1], None, None if h0 is None else grads[2], None, None


def once(ctx, *grads):
    raise RuntimeError(TWICE)


linear_scan.register_autograd(backward, setup_context=setup_context)
linear_scan_backward.register_autograd(once)


class ForTorchFunc(torch.autograd.Function):
    """torch.func.grad and vmap do not take the gradient that an operator registers, but that of such a class."""

    generate_vmap_rule = True
    setup_context, backward = staticmethod(setup_context), staticmethod(backward)

    @staticmethod
    def forward(*args):
        return linear_scan(*args)


class GradientsForTorchFunc(torch.autograd.Function):
    generate_vmap_rule = True
    backward = staticmethod(once)

    @staticmethod
    def forward(*args):
        return linear_scan_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass
