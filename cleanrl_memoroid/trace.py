"""What one step of a network computes, as a short program on flat float32 arrays: see `cleanrl_memoroid.export`.

`trace` runs the network's own `step` once and watches the operators of PyTorch. What depends on weights alone is computed now,
complex numbers become pairs of real ones, and whatever only moves numbers about becomes one gather.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Instruction(NamedTuple):
    """out = op(ins): linear is W x + b for each run of inputs; gather reads the concatenated inputs; sum adds up runs."""

    op: str
    ins: tuple  # of value numbers
    size: int  # of the value that it makes
    param: object = None  # linear: (W [out, in], b [out]); gather: indices; const: numbers; sum: how many to one


class Val(NamedTuple):
    """A tensor that depends on observation or state: its real and its imaginary part, as value numbers, and its shape."""

    re: int
    im: int | None
    shape: tuple


class Program:
    """A list of instructions; the value of each is known by its place."""

    def __init__(self):
        self.code, self.outputs, self.constants = [], {}, {}

    def emit(self, op, ins, size, param=None):
        self.code.append(Instruction(op, tuple(ins), int(size), param))
        return len(self.code) - 1

    def const(self, numbers):
        numbers = np.asarray(numbers, np.float32).ravel()
        if (key := numbers.tobytes()) not in self.constants:
            self.constants[key] = self.emit("const", (), len(numbers), numbers)
        return self.constants[key]

    def gather(self, sources, index):
        """Numbers of the concatenated sources. Gathers of gathers are one, and those that change nothing are none."""
        index, parts = np.asarray(index, np.int64).ravel(), []
        for source in sources:
            made = self.code[source]
            inner = made.ins if made.op == "gather" else (source,)
            parts.append((inner, made.param if made.op == "gather" else np.arange(made.size)))
        flat = list(dict.fromkeys(source for inner, _ in parts for source in inner))
        begins = dict(zip(flat, np.cumsum([0, *(self.code[source].size for source in flat)])))
        table = []
        for inner, places in parts:
            where = np.concatenate([begins[source] + np.arange(self.code[source].size) for source in inner])
            table.append(where[places])
        index = np.concatenate(table)[index]
        used = [s for s in flat if ((index >= begins[s]) & (index < begins[s] + self.code[s].size)).any()]
        for source in reversed([source for source in flat if source not in used]):
            index = np.where(index >= begins[source], index - self.code[source].size, index)
        if len(used) == 1 and np.array_equal(index, np.arange(self.code[used[0]].size)):
            return used[0]
        if all(self.code[source].op == "const" for source in used):
            return self.const(np.concatenate([self.code[source].param for source in used])[index])
        return self.emit("gather", used, len(index), index)

    def unary(self, op, x):
        return self.emit(op, (x,), self.code[x].size)

    def binary(self, op, x, y):
        """Of values of one size."""
        const = [self.code[v].param if self.code[v].op == "const" else None for v in (x, y)]
        neutral = {"add": 0, "mul": 1}.get(op)
        for this, other in ((0, y), (1, x)):
            if neutral is not None and const[this] is not None and (const[this] == neutral).all():
                return other
            if op == "mul" and const[this] is not None and (const[this] == 0).all():
                return (x, y)[this]
        return self.emit(op, (x, y), self.code[x].size)

    def needed(self):
        """The program without instructions that no output needs."""
        alive = set()
        todo = list(self.outputs.values())
        while todo:
            if (value := todo.pop()) not in alive:
                alive.add(value)
                todo += self.code[value].ins
        alive |= {i for i, made in enumerate(self.code) if made.op == "input"}
        new = {old: i for i, old in enumerate(sorted(alive))}
        small = Program()
        small.code = [self.code[i]._replace(ins=tuple(new[j] for j in self.code[i].ins)) for i in sorted(alive)]
        small.outputs = {name: new[value] for name, value in self.outputs.items()}
        return small


MOVES = """view _unsafe_view reshape unsqueeze squeeze expand select slice permute transpose t split split_with_sizes unbind
    clone detach alias stack cat index_select repeat lift_fresh unsafe_split unsafe_chunk chunk flip""".split()
UNARY = "exp neg tanh sigmoid sqrt reciprocal expm1 abs log".split()
BINARY = "add sub mul div".split()


class Tracer(TorchDispatchMode):
    """Watches operators as they run, and writes down those that depend on the inputs."""

    def __init__(self, inputs):
        """inputs: {name: (tensor, number of real values)}"""
        super().__init__()
        self.program, self.known, self.keep = Program(), {}, []
        self.addresses = {}
        for name, tensor in inputs.items():
            real = self.program.emit("input", (), tensor.numel() * (2 if tensor.is_complex() else 1), name)
            parts = (real, None)
            if tensor.is_complex():
                whole, n = real, tensor.numel()
                parts = tuple(self.program.gather([whole], range(i * n, (i + 1) * n)) for i in range(2))
            self.addresses[tensor.data_ptr()] = Val(*parts, tuple(tensor.shape))

    def find(self, tensor):
        """What is known of a tensor: it was made from inputs, it lies where an input lies, or it is a constant (None)."""
        found = self.known.get(id(tensor))
        return found if found or not tensor.numel() else self.addresses.get(tensor.data_ptr())

    def val(self, x, shape=None):
        """Any operand as a Val, broadcast to a shape if one is given."""
        found = self.find(x) if isinstance(x, torch.Tensor) else None
        if found is None:
            x = torch.as_tensor(x).detach()
            parts = [self.program.const(v) for v in ((x.real, x.imag) if x.is_complex() else (x,))]
            found = Val(parts[0], parts[1] if len(parts) > 1 else None, tuple(x.shape))
        if shape is not None and tuple(shape) != found.shape:
            index = torch.arange(int(np.prod(found.shape))).view(found.shape).expand(shape)
            found = self.move([found], index)
        return found

    def move(self, vals, index):
        """A Val from numbers of others, whose tensors are thought of as one after the other."""
        re = self.program.gather([v.re for v in vals], index)
        im = None
        if any(v.im is not None for v in vals):
            im = self.program.gather([self.imag(v) for v in vals], index)
        return Val(re, im, tuple(index.shape))

    def imag(self, v):
        return v.im if v.im is not None else self.program.const(np.zeros(self.program.code[v.re].size))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        name = func.overloadpacket.__name__
        if any(self.find(v) for v in tensors):
            with torch.utils._python_dispatch._disable_current_modes():
                result = self.rule(name.removesuffix("_") if name[0] != "_" else name, func, args, kwargs, out)
            outs = out if isinstance(out, (list, tuple)) else [out]
            for tensor, value in zip(outs, result if isinstance(result, list) else [result]):
                self.known[id(tensor)] = value
                self.keep.append(tensor)  # an id is free again once its object is gone
        return out

    def rule(self, name, func, args, kwargs, out):
        """The Val of an operator's output, or a list of them."""
        p = self.program
        if name in MOVES:  # the same operator on places shows where each number comes from
            vals, begin = [], 0

            def places(x):
                nonlocal begin
                if not isinstance(x, torch.Tensor) or name == "index_select" and vals:
                    return x
                vals.append(self.val(x))
                begin += x.numel()
                return torch.arange(begin - x.numel(), begin).view(x.shape)

            moved = func(*tree_map(places, args), **kwargs)
            return [self.move(vals, v) for v in moved] if isinstance(moved, (list, tuple)) else self.move(vals, moved)
        if name == "_to_copy":
            v = self.val(args[0])
            return v._replace(im=self.imag(v) if out.is_complex() else None)
        if name == "view_as_real":
            v = self.val(args[0])
            n = p.code[v.re].size
            index = torch.arange(2 * n).view(2, n).T.reshape(*v.shape, 2)
            return Val(p.gather([v.re, self.imag(v)], index), None, tuple(index.shape))
        if name == "view_as_complex":
            v = self.val(args[0])
            index = torch.arange(p.code[v.re].size).view(-1, 2)
            return Val(p.gather([v.re], index[:, 0]), p.gather([v.re], index[:, 1]), v.shape[:-1])
        if name == "complex":
            return Val(self.val(args[0], out.shape).re, self.val(args[1], out.shape).re, tuple(out.shape))
        if name == "constant_pad_nd":
            v, fill = self.val(args[0]), p.const(args[2] if len(args) > 2 else 0)
            index = torch.arange(p.code[v.re].size).view(v.shape)
            index = torch.constant_pad_nd(index, args[1], index.numel())
            return Val(p.gather([v.re, fill], index), None, tuple(index.shape))
        if name in ("zeros_like", "scalar_tensor"):
            return self.val(out)
        if name == "where":
            begins, *vals = (self.val(x, out.shape) for x in args)
            parts = [p.emit("where", (begins.re, *(v.re for v in vals)), out.numel())]
            if out.is_complex():
                parts.append(p.emit("where", (begins.re, *map(self.imag, vals)), out.numel()))
            return Val(parts[0], parts[1] if len(parts) > 1 else None, tuple(out.shape))
        if name in ("addmm", "mm"):
            bias, x, w = args if name == "addmm" else (None, *args)
            if self.find(w):
                return self.matmul(x[None], w[None], out, bias)
            weight = w.detach().numpy().T
            bias = np.zeros(len(weight)) if bias is None else bias.detach().numpy()
            params = np.ascontiguousarray(weight + 0.0, np.float32), np.asarray(bias, np.float32)  # + 0: no zero is negative
            return Val(p.emit("linear", (self.val(x).re,), out.numel(), params), None, tuple(out.shape))
        if name == "bmm":
            return self.matmul(*args, out)
        if name in ("mean", "sum"):
            v = self.val(args[0])
            dims = [d % len(v.shape) for d in np.atleast_1d(args[1])]
            index = torch.arange(int(np.prod(v.shape))).view(v.shape).movedim(dims, list(range(-len(dims), 0)))
            run = int(np.prod([v.shape[d] for d in dims]))
            total = p.emit("sum", (p.gather([v.re], index),), out.numel(), run)
            return Val(self.scale(total, 1 / run) if name == "mean" else total, None, tuple(out.shape))
        first = out[0] if isinstance(out, tuple) else out
        if name in BINARY or name == "rsub":
            if kwargs.get("alpha", 1) != 1:
                raise NotImplementedError(f"{func} with alpha")
            a, b = (self.val(x, first.shape) for x in (args[:2] if name != "rsub" else args[1::-1]))
            return self.arithmetic("sub" if name == "rsub" else name, a, b)
        if name == "addcmul":
            a, b, c = (self.val(x, first.shape) for x in args)
            return self.arithmetic("add", a, self.arithmetic("mul", b, c))
        if name == "lerp":
            a, b, c = (self.val(x, first.shape) for x in args)
            return self.arithmetic("add", a, self.arithmetic("mul", c, self.arithmetic("sub", b, a)))
        v = self.val(args[0])
        if v.im is not None and name != "neg":
            raise NotImplementedError(f"{func} of complex numbers")
        if name in UNARY:
            return Val(p.unary(name, v.re), None if v.im is None else p.unary(name, v.im), v.shape)
        value = self.real_function(name, v, args, first)
        if value is None:
            raise NotImplementedError(f"export knows no {func}: add a rule for it to cleanrl_memoroid/trace.py")
        return [Val(value, None, tuple(first.shape))] if isinstance(out, tuple) else Val(value, None, tuple(first.shape))

    def real_function(self, name, v, args, out):
        """The value number of a function of real numbers that has a name of its own, or None."""
        p, x, n = self.program, v.re, self.program.code[v.re].size

        def bound(op, x, limit):
            return p.binary(op, x, p.const(np.full(n, limit)))

        if name == "relu":
            return bound("max", x, 0)
        if name == "leaky_relu":
            return p.binary("max", x, self.scale(x, args[1] if len(args) > 1 else 0.01))
        if name == "elu":
            return p.binary("add", bound("max", x, 0), p.unary("expm1", bound("min", x, 0)))
        if name == "clamp":
            x = x if len(args) < 2 or args[1] is None else bound("max", x, args[1])
            return x if len(args) < 3 or args[2] is None else bound("min", x, args[2])
        if name == "gelu":
            grown = bound("add", p.unary("erf", self.scale(x, 0.5**0.5)), 1)
            return p.binary("mul", self.scale(x, 0.5), grown)
        if name == "glu":
            index = torch.arange(n).view(v.shape).chunk(2, args[1] if len(args) > 1 else -1)
            left, right = (p.gather([x], i) for i in index)
            return p.binary("mul", left, p.unary("sigmoid", right))
        run = v.shape[-1]
        spread = np.repeat(np.arange(n // run), run)
        if name == "_log_softmax" and args[1] % len(v.shape) == len(v.shape) - 1:
            total = p.emit("sum", (p.unary("exp", x),), n // run, run)
            return p.binary("sub", x, p.gather([p.unary("log", total)], spread))
        if name == "native_layer_norm" and len(args[1]) == 1:
            mean = self.scale(p.emit("sum", (x,), n // run, run), 1 / run)
            x = p.binary("sub", x, p.gather([mean], spread))
            square = self.scale(p.emit("sum", (p.binary("mul", x, x),), n // run, run), 1 / run)
            deviation = p.unary("sqrt", p.binary("add", square, p.const(np.full(n // run, args[4]))))
            x = p.binary("div", x, p.gather([deviation], spread))
            for op, parameter in (("mul", args[2]), ("add", args[3])):
                if parameter is not None:
                    x = p.binary(op, x, p.const(np.tile(parameter.detach().numpy(), n // run)))
            return x
        return None

    def scale(self, x, factor):
        return self.program.binary("mul", x, self.program.const(np.full(self.program.code[x].size, factor)))

    def arithmetic(self, op, a, b):
        """Of real or complex Vals of one shape."""
        p = self.program
        if a.im is None and b.im is None or op in ("add", "sub"):
            im = None if a.im is None and b.im is None else p.binary(op, self.imag(a), self.imag(b))
            return Val(p.binary(op, a.re, b.re), im, a.shape)
        if op == "div":
            raise NotImplementedError("a quotient of complex numbers")
        if a.im is None or b.im is None:
            real, other = (a, b) if a.im is None else (b, a)
            return Val(p.binary("mul", other.re, real.re), p.binary("mul", other.im, real.re), a.shape)
        re = p.binary("sub", p.binary("mul", a.re, b.re), p.binary("mul", a.im, b.im))
        return Val(re, p.binary("add", p.binary("mul", a.re, b.im), p.binary("mul", a.im, b.re)), a.shape)

    def matmul(self, a, b, out, bias=None):
        """A product of two real values that both depend on the inputs. [N, I, K], [N, K, J]"""
        if bias is not None:
            raise NotImplementedError("a bias on a product of two values")
        (n, rows, inner), columns = a.shape, b.shape[2]
        left = self.val(a).re, torch.arange(a.numel()).view(n, rows, 1, inner).expand(n, rows, columns, inner)
        right = self.val(b).re, torch.arange(b.numel()).view(n, inner, columns).mT[:, None].expand(n, rows, columns, inner)
        both = (self.program.gather([value], index) for value, index in (left, right))
        product = self.program.binary("mul", *both)
        return Val(self.program.emit("sum", (product,), out.numel(), inner), None, tuple(out.shape))


def trace(agent, obs_size, state):
    """The program of one step of one environment.

    Args:
        agent: a network with `step(obs, begins, state)`, as the scripts have.
        obs_size: numbers of an observation.
        state: the state of one environment, [1, ...].
    Returns: a Program with inputs observation, begin and state, and outputs action and state.
    """
    obs, begins, state = np.zeros((1, obs_size), np.float32), np.zeros(1, bool), state.clone()
    tracer = Tracer({"observation": torch.from_numpy(obs), "begin": torch.from_numpy(begins), "state": state})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about Intel GPUs, when oneDNN is switched off
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), tracer:  # it would run an LSTM as one operator
            action, *_, after = agent.step(obs, begins, state)
    program = tracer.program
    action, after = tracer.val(action[0] if isinstance(action, tuple) else action), tracer.val(after)
    program.outputs["action"] = action.re
    program.outputs["state"] = after.re
    if after.im is not None:
        program.outputs["state"] = program.gather([after.re, after.im], range(2 * program.code[after.re].size))
    return program.needed()
