"""Acting and updates of the scripts at their default sizes, with matrix products by MKL and by oneDNN: was tune_cpu right?

    python benchmark/speed/products.py            # one core, two minutes; writes products.csv

On a processor with AVX-512, PyTorch hands products in single precision to oneDNN if lower precision is permitted. `tune_cpu`
permits it only if that is faster here; the comment of the file says what it chose. The environments are not part of the times.
"""

import numpy as np
from timing import ROOT, interleave, load_script, parser, print_table, ratio, set_up, write_csv

SCRIPTS = [f"{algorithm}_tbb_{memory}" for algorithm in ("dqn", "ppo") for memory in ("ffm", "lru", "linattn", "mingru")]


def main():
    args = parser(__doc__.split("\n")[0], rounds=10, seconds=4).parse_args()
    where = set_up(args)
    import torch
    from cuda import acting, dqn_update, ppo_update

    switch, rows = torch.backends.mkldnn.matmul, []

    def by(way, call):
        def run():
            switch.fp32_precision = way
            return call()

        return run

    for name in SCRIPTS:
        script = load_script(ROOT / "single_files" / f"{name}.py")
        own = script.Args()
        update, _, _, network, heads, _ = (dqn_update if "dqn" in name else ppo_update)(script, own, "cpu")
        step, inputs = acting(network, heads, own.num_envs, "cpu")
        inputs = [torch.as_tensor(value) for value in inputs]
        for what, call in (("acting", lambda step=step, inputs=inputs: step(*inputs)), ("update", update)):
            times = interleave({"MKL": by("ieee", call), "oneDNN": by("bf16", call)}, args)
            medians = {f"{library}_ms": float(np.median(values)) for library, values in times.items()}
            rows.append({"script": name, "what": what, **medians, "onednn_vs_mkl": ratio(times, "oneDNN", "MKL")[0]})
    print_table(rows, where)
    write_csv("products", where, rows, args)


if __name__ == "__main__":
    main()
