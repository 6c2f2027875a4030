"""``python -m awp_optim``: the command line."""

from awp_optim.cli import main

if __name__ == "__main__":
    main()
