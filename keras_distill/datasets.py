"""The examples' data: small image sets as arrays, split the same way every time."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

_TFDS = ("mnist", "cifar10")
NAMES = ("digits", *_TFDS)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images and labels in three parts that share no row.

    Attributes:
        name: What was asked for.
        train: `(x, y)`: float32 images `(N, H, W, C)` in [0, 1], int32 labels `(N,)`.
        validation: The same, for decisions during training.
        test: The same, for the final figures.
        class_names: One name per label.
    """

    name: str
    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    class_names: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, `(H, W, C)`."""
        return self.train[0].shape[1:]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load(
    name: str = "digits", *, data_dir: str | None = None, download: bool = True
) -> Dataset:
    """Loads a data set by name.

    * `"digits"`: scikit-learn's handwritten digits, which are part of that package:
      1000 / 297 / 500 images of 8 x 8 x 1 for training, validation and test.
    * `"mnist"`, from TensorFlow Datasets: 54000 / 6000 / 10000 of 28 x 28 x 1.
    * `"cifar10"`, from TensorFlow Datasets: 45000 / 5000 / 10000 of 32 x 32 x 3.

    The parts are the same in every call: `"digits"` is divided by a fixed
    permutation, the other two keep their own test part, and the last tenth of their
    train part is the validation part.

    Args:
        name: `"digits"`, `"mnist"` or `"cifar10"`.
        data_dir: Folder with prepared TensorFlow Datasets. Default: the environment
            variable `TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
        download: Whether TensorFlow Datasets may download what is not there.

    Raises:
        ValueError: If the name is unknown, or `data_dir` is given for `"digits"`.
        FileNotFoundError: If the data are neither there nor can be downloaded.

    Example:

    >>> from keras_distill import datasets
    >>> digits = datasets.load("digits")
    >>> digits.input_shape, digits.num_classes, len(digits.test[0])
    ((8, 8, 1), 10, 500)
    """
    if name == "digits":
        if data_dir is not None:
            raise ValueError(
                "`data_dir` has no effect on 'digits', which is part of scikit-learn. "
                f"Received: data_dir={data_dir!r}"
            )
        return _digits()
    if name in _TFDS:
        return _tfds(name, data_dir, download)
    raise ValueError(f"`name` must be one of {', '.join(NAMES)}. Received: {name!r}")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.images[..., None] / 16).astype("float32")
    y = bunch.target.astype("int32")
    # Neighbouring rows were written by the same person: mix before dividing.
    order = np.random.default_rng(0).permutation(len(x))
    train, validation, test = np.split(order, [1000, len(x) - 500])
    return Dataset(
        name="digits",
        train=(x[train], y[train]),
        validation=(x[validation], y[validation]),
        test=(x[test], y[test]),
        class_names=tuple(str(digit) for digit in bunch.target_names),
    )


def _tfds(name: str, data_dir: str | None, download: bool) -> Dataset:
    import tensorflow_datasets as tfds

    try:
        parts, info = tfds.load(
            name,
            split=["train[:90%]", "train[90%:]", "test"],
            data_dir=data_dir,
            download=download,
            as_supervised=True,
            batch_size=-1,
            with_info=True,
        )
    except Exception as error:
        # What goes wrong without data or network has many types: AssertionError,
        # OSError, and those of the downloader.
        default = os.path.join("~", "tensorflow_datasets")
        folder = data_dir or os.environ.get("TFDS_DATA_DIR") or default
        raise FileNotFoundError(
            f"TensorFlow Datasets could not load {name!r} from {folder}. Set "
            "TFDS_DATA_DIR (or `data_dir`) to a folder that holds the prepared data, "
            f"or allow a download (download={download}). The cause: {error}"
        ) from error
    train, validation, test = (_arrays(part) for part in tfds.as_numpy(parts))
    return Dataset(name, train, validation, test, tuple(info.features["label"].names))


def _arrays(part: Any) -> tuple[np.ndarray, np.ndarray]:
    images, labels = part
    return images.astype("float32") / 255, labels.astype("int32")
