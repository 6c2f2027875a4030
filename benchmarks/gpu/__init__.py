"""What only a GPU can answer, one question a file: ``python -m benchmarks.gpu.step``.

======================  =======================================================================
``correct``             do the tests marked ``gpu`` pass?
``step``                how long does a training step take, against the plain implementation?
``compiled``            the same, for a network compiled by ``torch.compile``
``mfu``                 which share of the device's matrix rate does a step reach?
``memory``              how much more memory does AT-AWP take than AT?
``weights``             how long does the weight arithmetic take, against a copy?
``attacks``             how long does PGD take, against torchattacks?
``reproduce``           which accuracy does the paper's training run reach?
``autoattack``          which accuracy does AutoAttack leave to that run's best checkpoint?
======================  =======================================================================

Each needs torch alone (``correct`` also pytest, ``reproduce`` numpy), ends within eight minutes,
writes a JSON file after every case and prints a table last. ``--case TEXT`` selects cases,
``--device cpu --quick`` checks on the smallest sizes that a question can be answered.
"""
