"""Reports on finished runs and evaluations.

:mod:`runs` finds and groups run folders, :mod:`summary` has their accuracies, :mod:`landscapes`
measures their checkpoints, :mod:`sharpness` puts that in numbers, :mod:`figures` makes the paper's
figures of it and :mod:`gallery` a page of these. :mod:`tables` is for evaluations. :mod:`plots`
alone draws.
"""
