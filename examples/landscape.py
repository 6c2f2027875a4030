"""Weight loss landscapes of training runs, the paper's Figures 1 to 8 and 11: ``awp landscape``.

python examples/landscape.py runs/at runs/at-awp --figure methods
python examples/landscape.py runs/at --figure epochs --limit 1000
python examples/landscape.py runs --gallery --limit 1000
torchrun --nproc-per-node 8 examples/landscape.py runs --gallery
"""

import sys

from awp_optim.cli import main

if __name__ == "__main__":
    main(["landscape", *sys.argv[1:]])
