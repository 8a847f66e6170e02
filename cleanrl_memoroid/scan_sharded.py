"""A linear recurrence over a tape that is longer than one device: each process holds a stretch of its rows, in order of rank.

    from cleanrl_memoroid.scan_sharded import sharded_linear_scan
    h = sharded_linear_scan(decay, x, begins)      # on each process: the rows of h that belong to its rows of x

A stretch is one element of the memoroid: what it multiplies an earlier memory by, and the memory that it ends with. Processes
exchange these two, 2 x [channels] numbers each, whatever the length of the tape; then each goes on from the memory before its
stretch. The gradient takes the same way back.
"""

import torch
import torch.distributed as dist

from cleanrl_memoroid.scan import linear_scan


def sharded_linear_scan(decay, x, begins=None, h0=None, group=None):
    """As `cleanrl_memoroid.scan.linear_scan`, over the stretches of all processes of a group, one after the other.

    Args:
        decay, x, begins: as of `linear_scan`, of this process's rows: one row at least; stretches may differ in length, not in
            channels. A decay that is the same at every step has to be equal on all processes. begins may be None on some.
        h0: the state before the first row of the first process, which is the only one that reads it.
        group: of torch.distributed, already initialised; None: all processes. All of them have to call this function, and
            all have to call backward.
    Returns: h, this process's rows. Differentiable once. The gradient of a decay that is the same at every step is this
        process's share: add the shares up by `torch.distributed.all_reduce`, as DistributedDataParallel does with weights.
    Raises: ValueError if torch.distributed is not initialised; and as `linear_scan`.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: expected torch.distributed to be initialised, it is not; call init_process_group first")
    decay = decay if isinstance(decay, torch.Tensor) else x.new_full((), decay)
    return _ShardedScan.apply(decay, x, begins, h0, group)


def _gather(numbers, group):
    """The tensors of all processes, of one shape and dtype, in the order of their ranks."""
    real = torch.view_as_real(numbers) if numbers.is_complex() else numbers
    parts = [torch.empty_like(real) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, real.contiguous(), group=group)
    return [torch.view_as_complex(part) if numbers.is_complex() else part for part in parts]


class _ShardedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay, x, begins, h0, group):
        rank = dist.get_rank(group)
        end = linear_scan(decay, x, begins, h0 if rank == 0 else None)[-1]
        factor = decay.prod(0) if decay.dim() == x.dim() else decay ** len(x)  # of a memory that crosses this stretch
        factor = factor.to(x.dtype).expand_as(end).clone()
        if begins is not None:
            crossed = begins.any(0)
            factor[crossed.reshape(*crossed.shape, *(1,) * (end.dim() - crossed.dim())).expand_as(end)] = 0
        factors, ends = zip(*_gather(torch.stack([factor, end]), group))
        before = None if rank or h0 is None else h0.expand_as(end)
        for earlier, (its_factor, its_end) in enumerate(zip(factors[:rank], ends[:rank])):
            # a factor of zero forgets, whatever was there: 0 * inf is nan
            before = its_end if earlier == 0 else its_end + torch.where(its_factor == 0, 0, its_factor * before)
        before = torch.zeros_like(end) if before is None else before
        ctx.save_for_backward(decay, x, begins, before, *factors)
        ctx.group, ctx.h0_shape = group, None if h0 is None else h0.shape
        return linear_scan(decay, x, begins, before)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_h):
        decay, x, begins, before, *factors = ctx.saved_tensors
        rank = dist.get_rank(ctx.group)
        inputs = [v.detach().requires_grad_() for v in (decay, x, before)]
        with torch.enable_grad():
            h = linear_scan(inputs[0], inputs[1], begins, inputs[2])
        # what this stretch's rows say of the memory before it; then what all later ones say of the memory after it
        (own,) = torch.autograd.grad(h, inputs[2], grad_h, retain_graph=True)
        later = torch.zeros_like(own)
        for its_factor, its_own in list(zip(factors, _gather(own, ctx.group)))[:rank:-1]:
            later = its_own + torch.where(its_factor == 0, 0, its_factor.conj() * later)
        grad_h = grad_h.clone()
        grad_h[-1] += later
        grad_decay, grad_x, grad_before = torch.autograd.grad(h, inputs, grad_h)
        grad_h0 = None
        if ctx.h0_shape is not None and ctx.needs_input_grad[3]:
            grad_h0 = (
                grad_before.sum_to_size(ctx.h0_shape) if rank == 0 else torch.zeros_like(grad_before).sum_to_size(ctx.h0_shape)
            )
        return grad_decay, grad_x, None, grad_h0, None
