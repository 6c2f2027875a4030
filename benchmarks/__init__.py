"""What awp_optim costs, measured. Commands: ``docs/results.md``, "Repeating the measurements"."""
