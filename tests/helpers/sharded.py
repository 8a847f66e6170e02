"""Processes that each hold a stretch of a tape: `torchrun --nproc-per-node 4 sharded.py` checks the sharded scan in all."""

import itertools
import sys

import torch
import torch.distributed as dist

from cleanrl_memoroid.scan import linear_scan
from cleanrl_memoroid.scan_sharded import sharded_linear_scan


def case(dtype, per_step, begins_shape, h0, seed, cuts):
    """A tape [T, 3, 5] whose episodes begin on both sides of every cut, and what a single scan says of it."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=rng)

    steps = cuts[-1]
    decay = draw(steps, 3, 5) if per_step else draw(3, 5)
    decay = 0.95 * decay / (1 + decay.abs())
    begins = None
    if begins_shape:
        begins = torch.rand(steps, *begins_shape, generator=rng) < 0.05
        for cut in cuts[1:-1:2]:
            begins[cut - 1] = begins[cut] = True  # the last row of a stretch, and the first of the next
    leaves = [decay, draw(steps, 3, 5), draw(3, 5) if h0 else None]
    return [None if v is None else v.requires_grad_() for v in leaves], begins, draw(steps, 3, 5)


def check(group, number):
    """Values and gradients of a group's processes against the single scan; the bytes that one sends do not grow with T."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    worst = 0.0
    options = itertools.product((torch.float32, torch.complex64), (False, True), (None, (), (3,)), (False, True), (1, 40))
    for seed, (dtype, per_step, begins_shape, h0, longest) in enumerate(options):
        lengths = [1 + (longest - 1) * (3 * i + seed) % max(2, longest) for i in range(size)]  # uneven, of one row at least
        cuts = [0, *itertools.accumulate(lengths)]
        (decay, x, state), begins, weight = case(dtype, per_step, begins_shape, h0, seed, cuts)
        whole = linear_scan(decay, x, begins, state)
        inputs = [v for v in (decay, x, state) if v is not None]
        wanted = torch.autograd.grad((whole * weight).real.sum() if dtype.is_complex else (whole * weight).sum(), inputs)
        rows = slice(cuts[rank], cuts[rank + 1])
        mine = [v.detach()[rows] if v is x or (v is decay and per_step) else v.detach() for v in inputs]
        mine = [v.clone().requires_grad_() for v in mine]
        h = sharded_linear_scan(mine[0], mine[1], None if begins is None else begins[rows], mine[2] if h0 else None, group)
        loss = (h * weight[rows]).sum()
        found = torch.autograd.grad(loss.real if dtype.is_complex else loss, mine)
        pairs = [(h, whole[rows]), (found[1], wanted[1][rows])]
        if per_step:
            pairs.append((found[0], wanted[0][rows]))
        else:
            total = torch.view_as_real(found[0]).clone() if dtype.is_complex else found[0].clone()
            dist.all_reduce(total, group=group)
            pairs.append((torch.view_as_complex(total) if dtype.is_complex else total, wanted[0]))
        if h0 and rank == 0:
            pairs.append((found[2], wanted[2]))
        for ours, theirs in pairs:
            worst = max(worst, ((ours - theirs).abs().max() / (1 + theirs.abs().max())).item())
    print(f"group {number}, rank {rank} of {size}: {seed + 1} cases, largest difference {worst:.1e}", flush=True)
    return worst


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number = dist.get_rank() // 2
    worst = max(check(pairs[number], number), check(dist.group.WORLD, "all"))
    dist.destroy_process_group()
    sys.exit(worst > 1e-5)
