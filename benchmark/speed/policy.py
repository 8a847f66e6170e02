"""One step of a policy, teacher and student, in every form that the export writes: microseconds and bytes.

    python benchmark/speed/policy.py runs/bpd_teacher runs/STUDENT

Processor time of one thread, batch 1, the least of ten means. Bytes are those of the object file, code and constants; in
PyTorch, of the weights; in NumPy, of the file. "scalar" keeps the compiler from vector instructions, as on a
microcontroller; its flags are in the first line of the file. Writes benchmark/results/bpd/policy.csv.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import torch  # noqa: E402
from tables import write  # noqa: E402
from timing import ROOT, device_name  # noqa: E402

from cleanrl_memoroid import export  # noqa: E402
from cleanrl_memoroid.export_c import FLAGS, compiled, timed, write_c  # noqa: E402
from cleanrl_memoroid.trace import trace  # noqa: E402

SCALAR = "-std=c99 -O2 -fno-tree-vectorize -mno-avx -fPIC -shared".split()


def microseconds(step, repetitions):
    means = []
    for _ in range(10):
        start = time.process_time_ns()
        for _ in range(repetitions):
            step()
        means.append((time.process_time_ns() - start) / repetitions / 1e3)
    return min(means)


def object_bytes(header, folder):
    """Code and constants of a policy.h, for size: what `size` calls text and data, of an object that exports the step."""
    source = Path(folder) / "object.c"
    source.write_text(
        f'#include "{header}"\nvoid step(const float *o, int b, float *s, float *a) {{ policy_step(o, b, s, a); }}\n'
    )
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    subprocess.run([compiler, "-std=c99", "-Os", "-c", source, "-o", source.with_suffix(".o")], check=True)
    text, data = subprocess.run(["size", source.with_suffix(".o")], capture_output=True, text=True).stdout.split()[6:8]
    return int(text) + int(data)


def rows_of(name, folder, scratch):
    """Rows of one policy in every form."""
    agent, script, envs = export.load_run(folder)
    state, obs = export.initial_state(agent), export.played(envs, 50)[-1][0]
    program = trace(agent, len(obs), state)
    begins, rows = np.zeros(1, bool), []

    def row(form, us, size, error):
        rows.append(
            {
                "policy": name,
                "form": form,
                "microseconds a step": f"{us:.3g}",
                "bytes": f"{size:,}" if size else "",
                "bytes of state": f"{4 * len(export.flat(state)):,}",
                "error": f"{error:.0e}" if error is not None else "",
            }
        )

    weights = 4 * sum(v.numel() for k, v in agent.named_parameters() if not k.startswith(("critic", "actor_logstd")))
    if hasattr(agent, "layers"):  # a student's variances are not part of the policy
        weights = 4 * sum(v.numel() for k, v in agent.named_parameters() if "log_sigma2" not in k)
    row("PyTorch, eager", microseconds(lambda: agent.step(obs[None], begins, state), 100), weights, None)
    played = export.played(envs, export.STEPS)
    export.write_npz(program, os.path.join(scratch, "policy.npz"))
    policy = export.NumpyPolicy(os.path.join(scratch, "policy.npz"))
    flat = export.flat(state)
    error = export.largest_error(agent, policy.step, played)
    row("NumPy", microseconds(lambda: policy.step(obs, False, flat), 100), os.path.getsize(f"{scratch}/policy.npz"), error)
    for form, sparse in (("dense", 0), ("sparse", export.SPARSE)):
        if sparse and name == "teacher":
            continue
        header = os.path.join(scratch, "policy.h")
        write_c(program, header, script, sparse)
        size = object_bytes(header, scratch)
        for kind, flags in (("vectorised", FLAGS), ("scalar", SCALAR)):
            with tempfile.TemporaryDirectory() as folder:
                step = compiled(header, folder, flags)
                error = export.largest_error(agent, step, played)
                row(f"C, {form}, {kind}", timed(step, obs, flat), size, error)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="run directory of the teacher")
    parser.add_argument("student", help="run directory of the student")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmark" / "results" / "bpd" / "policy.csv", help="file to write"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = rows_of("teacher", args.teacher, scratch) + rows_of("student", args.student, scratch)
    version = subprocess.run([os.environ.get("CC", "cc"), "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    about = (
        f"# device: {device_name('cpu')}; one thread, processor time; {version}; vectorised: {' '.join(FLAGS[:-2])}; scalar: "
    )
    lines = [about + " ".join(SCALAR[:-2]) + "; bytes of C: -Os", ",".join(rows[0])]
    lines += [",".join(f'"{value}"' if "," in value else value for value in row.values()) for row in rows]
    write(args.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
