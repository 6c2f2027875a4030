"""Label images with a classifier, for robust self-training (RST): ``awp pseudo-label``.

python examples/pseudo_label.py --images x.npy --checkpoint runs/natural/last.pt --out xy.npz
python examples/pseudo_label.py --images x.npz --model mine:classifier --out xy.npz
python examples/cifar10.py --out runs/rst --method rst --unlabeled xy.npz
"""

import sys

from awp_optim.cli import main

if __name__ == "__main__":
    main(["pseudo-label", *sys.argv[1:]])
