"""A traced step as a C header: see `cleanrl_memoroid.export`."""

import ctypes
import os
import shutil
import subprocess
import time

import numpy as np

FLAGS = "-std=c99 -O3 -march=native -ffast-math -fPIC -shared".split()

FUNCTIONS = {
    "exp": "expf({})",
    "neg": "-{}",
    "tanh": "tanhf({})",
    "sqrt": "sqrtf({})",
    "reciprocal": "1.0f / {}",
    "abs": "fabsf({})",
    "expm1": "expm1f({})",
    "log": "logf({})",
    "erf": "erff({})",
    "sigmoid": "1.0f / (1.0f + expf(-{}))",
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "max": "fmaxf({}, {})",
    "min": "fminf({}, {})",
    "where": "{} > 0.0f ? {} : {}",
}
HEAD = """/* One step of a trained policy, of script {script}.
   observation: as the network saw it in training; begin: 1 in the first step of an episode, else 0;
   state: yours; zeros before the first step, changed in place; action: what the network returns. */
#ifndef POLICY_H
#define POLICY_H
#include <math.h>
#include <stdint.h>
"""


class Writer:
    """The C text of a program. Matrices of which a share below `sparse` is not zero are stored by rows (CSR), others whole."""

    def __init__(self, program, sparse):
        self.program, self.sparse, self.arrays, self.body = program, sparse, [], []
        for i, made in enumerate(program.code):
            if made.op == "const" and not self.uniform(made.param):
                self.array(f"v{i}", made.param)
            elif made.op not in ("input", "const"):
                self.body.append(f"float v{i}[{made.size}];")
                emit = {"linear": self.linear, "gather": self.gather, "sum": self.sum}.get(made.op, self.function)
                emit(i, made)

    def uniform(self, numbers):
        return len(numbers) > 0 and (numbers == numbers[0]).all()

    def array(self, name, numbers):
        """A constant array of the smallest type; returns its name."""
        if numbers.dtype.kind in "iu":
            largest = numbers.max(initial=0)
            kind = "uint8_t" if largest < 256 else "uint16_t" if largest < 65536 else "uint32_t"
            texts = map(str, numbers)
        else:
            kind, texts = "float", map(self.number, numbers)
        self.arrays.append(f"static const {kind} {name}[{max(1, len(numbers))}] = {{{', '.join(texts) or '0'}}};")
        return name

    def number(self, value):
        text = f"{value:.9g}"  # nine digits tell all float32 numbers apart
        return f"{text}f" if "." in text or "e" in text else f"{text}.0f"

    def name(self, value):
        made = self.program.code[value]
        return made.param if made.op == "input" else f"v{value}"

    def at(self, value, index="i"):
        """A number of a value; of a constant whose numbers are all one, the number itself."""
        made = self.program.code[value]
        if made.op == "const" and self.uniform(made.param):
            return self.number(made.param[0])
        return "(float)begin" if self.name(value) == "begin" else f"{self.name(value)}[{index}]"

    def function(self, i, made):
        call = FUNCTIONS[made.op].format(*map(self.at, made.ins))
        self.body.append(f"for (int i = 0; i < {made.size}; i++) v{i}[i] = {call};")

    def sum(self, i, made):
        inner = f"for (int j = 0; j < {made.param}; j++) sum += {self.at(made.ins[0], f'i * {made.param} + j')};"
        self.body.append(f"for (int i = 0; i < {made.size}; i++) {{ float sum = 0.0f; {inner} v{i}[i] = sum; }}")

    def linear(self, i, made):
        weight, bias = made.param
        (outs, width), source = weight.shape, self.name(made.ins[0])
        start = self.number(bias[0]) if self.uniform(bias) else f"{self.array(f'b{i}', bias)}[o]"
        if (weight != 0).mean() < self.sparse:
            rows, columns = np.nonzero(weight)
            self.array(f"w{i}", weight[rows, columns])
            self.array(f"k{i}", columns)
            self.array(f"p{i}", np.searchsorted(rows, np.arange(outs + 1)))
            inner = f"for (int j = p{i}[o]; j < p{i}[o + 1]; j++) sum += w{i}[j] * x[k{i}[j]];"
        else:
            self.array(f"w{i}", weight.ravel())
            inner = f"for (int j = 0; j < {width}; j++) sum += w{i}[o * {width} + j] * x[j];"
        self.body.append(f"for (int r = 0; r < {made.size // outs}; r++) {{")
        self.body.append(f"    const float *x = {source} + r * {width};")
        self.body.append(f"    for (int o = 0; o < {outs}; o++) {{")
        self.body.append(f"        float sum = {start};")
        self.body.append(f"        {inner}")
        self.body.append(f"        v{i}[r * {outs} + o] = sum;")
        self.body.append("    }")
        self.body.append("}")

    def gather(self, i, made):
        """A loop for each source."""
        begin = 0
        for source in made.ins:
            size = self.program.code[source].size
            to = np.flatnonzero((made.param >= begin) & (made.param < begin + size))
            left = self.index(f"t{i}_{source}", to)
            right = self.index(f"f{i}_{source}", made.param[to] - begin)
            self.body.append(f"for (int i = 0; i < {len(to)}; i++) v{i}[{left}] = {self.at(source, right)};")
            begin += size

    def index(self, name, places):
        """The i-th of some places, in C: a formula where they have one distance, else from a table."""
        first, step = int(places[0]), int(places[1] - places[0]) if len(places) > 1 else 0
        if np.array_equal(places, first + step * np.arange(len(places))):
            scaled = "i" if step == 1 else f"{step} * i"
            return scaled if first == 0 else f"{first} + {scaled}"
        return f"{self.array(name, places)}[i]"


def write_c(program, path, script, sparse):
    """Writes policy.h: `policy_step(observation, begin, state, action)`."""
    writer = Writer(program, sparse)
    sizes = {made.param: made.size for made in program.code if made.op == "input" and made.param != "begin"}
    lines = [HEAD.replace("{script}", script)]
    copies = []
    for name, value in program.outputs.items():
        sizes[name] = program.code[value].size
        copies.append(f"for (int i = 0; i < {sizes[name]}; i++) {name}[i] = {writer.at(value)};")
    lines.append(f"enum {{ {', '.join(f'POLICY_{name.upper()} = {size}' for name, size in sizes.items())} }};")
    lines += [
        *writer.arrays,
        "",
        "static void policy_step(const float *observation, int begin, float *state, float *action) {",
    ]
    lines += [*(f"    {line}" for line in [*writer.body, *copies]), "}", "", "#endif", ""]
    with open(path, "w") as file:
        file.write("\n".join(lines))


def compiled(path, folder, flags=FLAGS):
    """step(observation, begin, state) -> (action, state) of a policy.h, by this machine's C compiler; None without one."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    source = os.path.join(folder, "policy.c")
    library = os.path.join(folder, f"policy{time.time_ns()}.so")  # a name that was loaded before would be loaded again
    with open(source, "w") as file:
        file.write(
            f'#include "{os.path.abspath(path)}"\nenum {{ O = POLICY_OBSERVATION, S = POLICY_STATE, A = POLICY_ACTION }};\n'
        )
        file.write(
            "void run(const float *o, int b, float *s, float *a, int n) { for (; n > 0; n--) policy_step(o, b, s, a); }\n"
        )
        file.write("void sizes(int *n) { n[0] = O; n[1] = S; n[2] = A; }\n")
    subprocess.run([compiler, *flags, source, "-o", library, "-lm"], check=True)
    run, sizes = ctypes.CDLL(library).run, (ctypes.c_int * 3)()
    ctypes.CDLL(library).sizes(sizes)

    def step(observation, begin, state, times=1):
        state, action = np.array(state, np.float32), np.zeros(sizes[2], np.float32)
        pointers = (
            v.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for v in (np.asarray(observation, np.float32), state, action)
        )
        o, s, a = pointers
        run(o, int(begin), s, a, times)
        return action, state

    return step


def timed(step, observation, state, times=20_000):
    """Microseconds of CPU of one step of compiled C: the least of ten means."""
    means = []
    for _ in range(10):
        start = time.process_time_ns()
        step(observation, 0, state, times)
        means.append((time.process_time_ns() - start) / times / 1e3)
    return min(means)
