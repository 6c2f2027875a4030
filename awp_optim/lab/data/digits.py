"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

import numpy as np
import torch

from awp_optim.lab.data.images import ImageData

__all__ = ["load_digits"]


def load_digits() -> ImageData:
    """The 1,797 gray 8x8 images of ten digits that come with scikit-learn.

    Pixels are 0..16 there and ``round(v * 255 / 16)`` here, so value/255 is v/16 up to rounding.
    ``train_test_split(..., test_size=0.5, stratify=y, random_state=0)`` gives 898 training and 899
    test images, with the same proportion of every class.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = sklearn_digits()
    x = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    split = train_test_split(
        x, digits.target, test_size=0.5, stratify=digits.target, random_state=0
    )
    x_train, x_test, y_train, y_test = (torch.from_numpy(np.ascontiguousarray(a)) for a in split)
    return ImageData(
        x_train,
        y_train.long(),
        x_test,
        y_test.long(),
        classes=tuple("0123456789"),
        name="digits",
    ).with_statistics()
