"""The commands of ``awp``, one a module: each has ``main(arguments, ranks)``."""
