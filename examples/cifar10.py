"""Adversarial training with AWP on CIFAR-10, as in Section 4.4 of the paper: ``awp train``.

python examples/cifar10.py --out runs/at-awp                     # the paper's AT-AWP
python examples/cifar10.py --out runs/at --gamma 0               # plain adversarial training
python examples/cifar10.py --out runs/wide --recipe trades-awp/cifar10-linf-wrn34-10
python examples/cifar10.py --out runs/rst --method rst --labeled 4000
python examples/cifar10.py --out runs/fast --compile            # faster, after minutes of compiling
python examples/cifar10.py --out runs/try --limit 512 --epochs 2 # to try it on a CPU
python examples/cifar10.py --help                                # all settings

torchrun --nproc-per-node 8 examples/cifar10.py --out runs/at-awp --resume
"""

import sys

from awp_optim.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
