"""The paper's comparisons, several seeds of each setting: ``awp compare``.

    python examples/compare.py methods        # five methods, each with and without AWP: Table 2
    python examples/compare.py figure2        # steps, size and norm of the perturbation
    python examples/compare.py regularizers   # other regularization: Figure 3 (d), Tables 4 and 5
    python examples/compare.py rwp            # random perturbation: Figure 3 (c)
    python examples/compare.py cifar10-small  # AT, TRADES and MART on a part of CIFAR-10
    python examples/compare.py rwp --recipe at/cifar10-linf-preact18 --device cuda

On a cluster, with the runs on dask's workers (one thread each):

    from dask.distributed import Client
    from awp_optim.lab.commands.compare import Options, compare

    with Client("tcp://scheduler:8786") as client:
        compare(Options("methods", seeds=5), executor=client.get_executor())
"""

import sys

from awp_optim.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
