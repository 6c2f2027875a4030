"""What awp_optim costs, measured; see the README for the commands."""
