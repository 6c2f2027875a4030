"""Robust accuracy of a classifier, from FGSM to AutoAttack: ``awp evaluate``.

    python examples/evaluate.py --checkpoint runs/at-awp/best.pt
    python examples/evaluate.py --checkpoint runs/at-awp/best.pt --plot \\
        --attacks fgsm,pgd20,pgd100,cw,spsa,autoattack --out results/at-awp
    python examples/evaluate.py --model mine:classifier --mean 0.5 0.5 0.5 --std 0.2 0.2 0.2 \\
        --out results/mine
    python examples/evaluate.py --robustbench Wu2020Adversarial --attacks autoattack \\
        --out results/wu2020

Every evaluation needs a folder of its own, --out (default: evaluation).
"""

import sys

from awp_optim.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
