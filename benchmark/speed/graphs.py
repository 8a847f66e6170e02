"""CUDA graphs: the work of a function is recorded once for each kind of input, then replayed: one launch instead of a hundred.

    act = graphed(step, device)                         # on a CPU this is step itself
    policy, value, state = act(obs, begins, state)      # arrays or tensors in, tensors of your own out

Small networks leave a GPU waiting for the host, which needs several microseconds to launch each kernel. A graph pays if the
shapes stay the same from call to call, as they do when N environments act. No script uses it yet: benchmark/speed/cuda.py
measures on a card first whether it pays, and compares what it returns with the function's own results.
"""

import warnings

import torch

KINDS = 8  # of input that are recorded; each one keeps memory for what it computes
WARM_UP = 3  # calls before a recording: libraries choose their kernels, and Triton compiles


def graphed(function, device, record=None):
    """`function` as a CUDA graph, or the function itself where the device is no CUDA device.

    Args:
        function: takes tensors and returns a tuple of tensors. It has no effects, draws no random numbers on the device, and
            never waits for the device (no .item(), no shape that depends on values). It may read weights: a graph sees what
            optimizers change in place, but no new tensor that takes a weight's place.
        device: of the computation.
        record: `(function, inputs) -> (replay, outputs)`, in place of `record_cuda`: for tests.
    Returns: a callable of the same results. Inputs may be NumPy arrays or tensors of any device. If a recording fails, it
        warns and goes on with the function itself.
    """
    if torch.device(device).type != "cuda" and record is None:
        return function
    return Graphed(function, device, record or record_cuda)


class Graphed:
    """What `graphed` returns: {shapes and dtypes of the inputs: (inputs to fill, replay, outputs to read)}."""

    def __init__(self, function, device, record):
        self.function, self.device, self.record, self.recorded = function, torch.device(device), record, {}
        self.failed = False

    def __call__(self, *inputs):
        inputs = [torch.as_tensor(v) for v in inputs]
        kind = tuple((v.shape, v.dtype) for v in inputs)
        if kind not in self.recorded and (self.failed or len(self.recorded) == KINDS or not self._record(kind, inputs)):
            return self.function(*(v.to(self.device) for v in inputs))
        static, replay, outputs = self.recorded[kind]
        for place, v in zip(static, inputs):
            place.copy_(v)
        replay()
        return tuple(v.clone() for v in outputs)  # the next replay writes over these

    def _record(self, kind, inputs):
        """Did it work?"""
        static = [v.to(self.device, copy=True) for v in inputs]
        try:
            self.recorded[kind] = static, *self.record(self.function, static)
        except RuntimeError as error:  # what CUDA and PyTorch raise
            self.failed = True
            reason = str(error).partition("\n")[0]
            warnings.warn(f"no CUDA graph of {self.function}, so it runs as it is: {reason}", RuntimeWarning, 3)
        return not self.failed


def record_cuda(function, inputs, after_warm_up=lambda: None):
    """Records `function(*inputs)`; returns (replay, outputs). After `replay()` the outputs are those of what the inputs hold.

    `after_warm_up` is called before the recording, which executes nothing: it can undo what the calls before it did.
    """
    stream = torch.cuda.Stream()  # as PyTorch asks: not on the stream that is the default
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    after_warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    return graph.replay, outputs
