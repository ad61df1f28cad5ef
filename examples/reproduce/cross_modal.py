"""A teacher that sees teaches a student that hears, without a label on any sound.

Spoken digits (FSDD: 5 speakers, 50 clips of each digit per speaker) are paired with
MNIST images. The pairs are made up: each clip gets a random image of the same digit, of
those that the teacher was not trained on. That stands in for things which are seen and
heard together; the label makes the pairs, and nobody else gets to know it.

The teacher, a convolutional network, learned digits from 10,000 MNIST images. The
student, another one, hears log-mel spectrograms. Each seed holds out another speaker
for the test and trains, from the same initial weights and for the same number of
updates:

* distilled: from the teacher's word on the paired image alone, T = 2 (no labels);
* all labels: fully supervised, on the labels of all 2000 clips;
* 10 labels per class: supervised, on 100 clips.

`--smoke` takes tones and the embedded digits instead. To be run with

    TFDS_DATA_DIR=... python examples/reproduce/cross_modal.py [--seeds 5] [--smoke]
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import keras
import numpy as np
from experiment import Experiment, Row, means, name_of, parser
from keras import layers

import keras_distill as kd

FRAMES, BANDS, RATE = 64, 40, 8000
TEMPERATURE, BATCH, EPOCHS = 2.0, 64, 20
DISTILLED, ALL, FEW = "distilled, no labels", "all labels", "10 labels per class"
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Clips:
    """Log-mel spectrograms `(N, FRAMES, BANDS, 1)`, digits `(N,)`, speakers `(N,)`."""

    x: np.ndarray
    y: np.ndarray
    speaker: np.ndarray

    def of(self, rows: np.ndarray) -> Arrays:
        """Some clips and their digits."""
        return self.x[rows], self.y[rows]


def spectrogram(sound: np.ndarray) -> np.ndarray:
    """Log-mel energies of one clip: mean 0, deviation 1, its middle `FRAMES` frames."""
    length = 128 * (FRAMES - 1) + 256
    surplus = max(len(sound) - length, 0) // 2
    sound = sound[surplus : surplus + length].astype("float32") / 2**15
    before = (length - len(sound)) // 2
    sound = np.pad(sound, (before, length - len(sound) - before))
    frames = np.lib.stride_tricks.sliding_window_view(sound, 256)[::128]
    power = np.abs(np.fft.rfft(frames * np.hanning(256))) ** 2
    energies = np.log(power @ mel_filters() + 1e-6)
    return ((energies - energies.mean()) / (energies.std() + 1e-6))[..., None]


def mel_filters() -> np.ndarray:
    """Triangles, evenly spaced on the mel scale, `(129, BANDS)`."""

    def mel(frequency: float) -> float:
        return 2595 * np.log10(1 + frequency / 700)

    mels = np.linspace(mel(50), mel(RATE / 2), BANDS + 2)
    low, middle, high = (
        (700 * (10 ** (mels[i : BANDS + i] / 2595) - 1))[None] for i in range(3)
    )
    bins = np.linspace(0, RATE / 2, 129)[:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return np.maximum(np.minimum(rising, falling), 0)


def spoken_digits(cache: Path) -> Clips:
    """The spectrograms of all clips, kept in a file."""
    if not cache.exists():
        import tensorflow_datasets as tfds

        found = [
            (
                spectrogram(row["audio"]),
                row["label"],
                row["audio/filename"].decode().split("_")[1],
            )
            for row in tfds.as_numpy(tfds.load("spoken_digit", split="train"))
        ]
        x, y, speaker = (np.array(part) for part in zip(*found, strict=True))
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, x=x.astype("float16"), y=y, speaker=speaker)
    with np.load(cache) as file:
        return Clips(file["x"].astype("float32"), file["y"], file["speaker"])


def tones(clips: int = 200) -> Clips:
    """Clips for a trial: each digit a tone of its own, each speaker a little higher."""
    random = np.random.default_rng(0)
    y, speaker = np.arange(clips) % 10, np.arange(clips) // 10 % 5
    seconds = np.arange(RATE) / RATE
    pitch = (300 + 250 * y) * (1 + 0.01 * speaker)
    sounds = np.sin(2 * np.pi * pitch[:, None] * seconds)
    noisy = 5000 * (sounds + random.normal(size=sounds.shape))
    x = np.stack([spectrogram(sound) for sound in noisy]).astype("float32")
    return Clips(x, y, speaker)


def convnet(shape: tuple[int, ...], widths: tuple[int, ...]) -> keras.Model:
    """Convolutions that halve the grid, then the mean over it; gives logits."""
    x = inputs = keras.Input(shape)
    for width in widths:
        x = layers.Conv2D(width, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    x = layers.Dropout(0.3)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def trained_teacher(train: Arrays, epochs: int) -> keras.Model:
    """The network that sees."""
    keras.utils.set_random_seed(0)
    teacher = convnet(train[0].shape[1:], (32, 64, 64))
    steps = epochs * -(-len(train[1]) // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(3e-3, steps)
    teacher.compile(keras.optimizers.Adam(rate), LOSS)
    teacher.fit(*train, batch_size=BATCH, epochs=epochs, verbose=0)
    return teacher


def paired(labels: np.ndarray, images: Arrays, seed: int) -> np.ndarray:
    """For each label a random image of that digit."""
    random = np.random.default_rng(seed)
    x, y = images
    rows = {digit: np.flatnonzero(y == digit) for digit in range(10)}
    return x[[random.choice(rows[int(label)]) for label in labels]]


class Fold:
    """One speaker held out, and students for the others.

    Args:
        clips: All of them.
        images: Those that are paired with the clips.
        teacher: Sees images.
        seed: Of pairs, initial weights and batches, and which speaker is held out.
        epochs: Passes over the training clips, or as many updates.
    """

    def __init__(
        self, clips: Clips, images: Arrays, teacher: keras.Model, seed: int, epochs: int
    ) -> None:
        speakers = np.unique(clips.speaker)
        self.speaker = speakers[seed % len(speakers)]
        held_out = clips.speaker == self.speaker
        self.test, self.train = clips.of(held_out), clips.of(~held_out)
        self._teacher, self._seed, self._epochs = teacher, seed, epochs
        self._images = paired(self.train[1], images, seed)

    def run(self, run: str) -> float:
        """The test accuracy of a student in percent."""
        keras.utils.set_random_seed(self._seed)
        student = convnet((FRAMES, BANDS, 1), (16, 32, 64, 64))
        steps = self._epochs * -(-len(self.train[1]) // BATCH)
        rate = keras.optimizers.schedules.CosineDecay(3e-3, steps)
        optimizer = keras.optimizers.Adam(rate)
        if run == DISTILLED:
            self._distill(student, optimizer)
        else:
            x, y = self.train
            if run == FEW:
                chosen = np.random.default_rng(self._seed).permutation(len(y))
                few = [chosen[y[chosen] == digit][:10] for digit in range(10)]
                # As many updates as the others: the same clips again and again.
                rows = np.resize(np.concatenate(few), len(y))
                x, y = x[rows], y[rows]
            student.compile(optimizer, LOSS)
            student.fit(x, y, batch_size=BATCH, epochs=self._epochs, verbose=0)
        x, y = self.test
        return 100 * float(np.mean(student.predict(x, verbose=0).argmax(-1) == y))

    def _distill(self, student: keras.Model, optimizer: keras.Optimizer) -> None:
        distiller = kd.Distiller(
            student,
            kd.teachers.Model(self._teacher, inputs="image"),
            student_inputs="sound",
            temperature=TEMPERATURE,
            beta=1.0,
        )
        distiller.compile(optimizer)  # no loss: nothing here knows a label
        pairs = {"image": self._images, "sound": self.train[0]}
        distiller.fit(pairs, batch_size=BATCH, epochs=self._epochs, verbose=0)


def plot(rows: list[Row], path: Path) -> None:
    """Test accuracy of each student, one line per speaker held out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="tight")
    names = [FEW, DISTILLED, ALL]
    for seed in sorted({row["seed"] for row in rows}):
        own = {name_of(row): row for row in rows if row["seed"] == seed}
        known = [name for name in names if name in own]
        label = f"speaker {own[known[0]]['speaker']} held out"
        axes.plot(known, [own[n]["accuracy %"] for n in known], "o-", label=label)
    for place, name in enumerate(names):
        values = [row["accuracy %"] for row in rows if name_of(row) == name]
        if values:
            mean = statistics.mean(values)
            axes.plot([place - 0.2, place + 0.2], [mean, mean], color="black", lw=2)
    axes.set_ylabel("test accuracy %")
    axes.set_title("Sounds learned from a teacher that sees (bars: means)")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary(rows: list[Row]) -> dict[str, Row]:
    """Means, and the share of the fully supervised accuracy in the same fold."""
    table = means(rows, "accuracy %", ALL)
    full = {row["seed"]: row["accuracy %"] for row in rows if name_of(row) == ALL}
    for name, line in table.items():
        shares = [
            100 * row["accuracy %"] / full[row["seed"]]
            for row in rows
            if name_of(row) == name and row["seed"] in full
        ]
        line["% of all labels"] = statistics.mean(shares) if shares else None
    return table


def main() -> None:
    """Runs what is missing in the result file."""
    chosen = parser(__doc__.splitlines()[0], "cross_modal", seeds=5).parse_args()
    epochs, seeds = (2, 1) if chosen.smoke else (EPOCHS, chosen.seeds)
    if chosen.smoke:
        clips, data = tones(), kd.datasets.load("digits")
    else:
        clips = spoken_digits(chosen.runs / "clips.npz")
        data = kd.datasets.load("mnist")
    train = tuple(part[: 200 if chosen.smoke else 10000] for part in data.train)
    teacher = trained_teacher(train, epochs=3 if chosen.smoke else 5)
    said = teacher.predict(data.test[0], verbose=0).argmax(-1)
    experiment = Experiment(
        chosen,
        "cross_modal",
        "A teacher that sees, a student that hears",
        {
            "pairs": "each clip with a random image of the same digit, made by label",
            "clips": len(clips.y),
            "speakers": "one held out per seed, never heard in training",
            "teacher": f"{len(train[1])} images of {data.name}",
            "teacher's accuracy on test images %": round(
                100 * float(np.mean(said == data.test[1])), 1
            ),
            "temperature": TEMPERATURE,
            "epochs": epochs,
            "command": "python examples/reproduce/cross_modal.py",
        },
        summary,
    )
    for seed in range(seeds):
        fold = Fold(clips, data.validation, teacher, seed, epochs)
        for run in (ALL, DISTILLED, FEW):
            if experiment.has(run, seed):
                continue
            start = time.perf_counter()
            accuracy = fold.run(run)
            seconds = round(time.perf_counter() - start)
            row = {"accuracy %": accuracy, "speaker": str(fold.speaker)}
            experiment.add(run, seed, [{**row, "seconds": seconds}])
    plot(experiment.rows, experiment.path.with_suffix(".png"))
    for name, line in summary(experiment.rows).items():
        print(f"{name:<22} {line['accuracy %']:5.1f} %, {line['seeds']} speakers")


if __name__ == "__main__":
    main()
