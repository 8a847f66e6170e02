"""Linear attention in chunks of rows, behind `linear_attention` in `scan.py`: no memory [K, V] is stored for every row."""

import torch
import torch.nn.functional as F

CHUNK = 32  # rows that see each other in one matrix product


class ChunkedAttention(torch.autograd.Function):
    """query, key [N, C, K], value [N, C, V] of N chunks of C rows; `episode` [N, C, 1] counts the begins so far.

    The gradient is written out, as it can reuse the masks and add in place: the same products transposed, the scan in reverse.
    """

    @staticmethod
    def forward(ctx, query, key, value, episode, scan):
        end = episode[:, -1:]
        start = F.pad(end[:-1], (0, 0, 0, 0, 1, 0), value=-1)  # the episode that runs when the chunk starts: none in the first
        # Episodes count upwards: 1 + earlier - later is 1 if the two are the same, else 0 or less. Such a mask costs a third
        # of a comparison, and a product with it less than a selection
        at_end = (1 + episode - end).relu_()  # of the rows whose episode is still there at the chunk's end
        at_start = (1 + start - episode).relu_()  # of the rows whose episode began in an earlier chunk
        seen = (1 + episode.mT - episode).relu_().tril_()  # [N, C, C]: by this row, that earlier one
        begins = (start < end).flatten()
        x = scan(1.0, (key * at_end).mT @ value, begins).roll(1, 0)  # the memory before each chunk; the first looks at none
        scores = (query @ key.mT).mul_(seen)
        ctx.save_for_backward(query, key, value, at_end, at_start, seen, begins, x, scores)
        ctx.scan = scan
        return ((query * at_start) @ x).baddbmm_(scores, value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, at_end, at_start, seen, begins, x, scores = ctx.saved_tensors
        grad_scores = (grad @ value.mT).mul_(seen)
        grad_x = ctx.scan(1.0, ((query * at_start).mT @ grad).roll(-1, 0), begins.roll(-1), reverse=True)
        grad_query = (grad @ x.mT).mul_(at_start).baddbmm_(grad_scores, key)
        grad_key = (value @ grad_x.mT).mul_(at_end).baddbmm_(grad_scores.mT, query)
        grad_value = ((key * at_end) @ grad_x).baddbmm_(scores.mT, grad)
        return grad_query, grad_key, grad_value, None, None
