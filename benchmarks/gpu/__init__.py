"""What only a GPU can answer, one question a file: ``python -m benchmarks.gpu.step``.

======================  =======================================================================
``correct``             do the tests marked ``gpu`` pass?
``step``                how long does a training step take, against the plain implementation?
``compiled``            the same, for a network compiled by ``torch.compile``
``mfu``                 which share of the device's matrix rate does a step reach?
``kernels``             which kernels take the time of a step?
``memory``              how much more memory does AT-AWP take than AT?
``weights``             how long does the weight arithmetic take, against a copy?
``attacks``             how long does PGD take, compared with torchattacks?
``reproduce``           which accuracy does the paper's training run reach?
``autoattack``          which accuracy does AutoAttack leave to that run's best checkpoint?
======================  =======================================================================

They need torch alone, except for ``correct`` (pytest), ``reproduce`` (numpy), ``autoattack`` (numpy
and pyautoattack) and, for the comparison in ``attacks``, torchattacks. Each stops within eight
minutes: the same command of ``reproduce`` then resumes the run, and ``autoattack`` reports the
accuracy on the images so far. Each writes a JSON file after every case and prints a table last.
``--case TEXT`` selects cases, ``--device cpu --quick`` checks on the smallest sizes that a question
can be answered.
"""
