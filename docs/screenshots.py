"""Makes the pictures of docs/monitoring.md and docs/tuning.md, in docs/images.

Short runs are trained on the handwritten digits, TensorBoard is started on their
logs, and headless Chromium takes a picture of each page. Needs Chromium (on Debian the
package `chromium`), and what `pip install '.[examples]'` installs:

    python docs/screenshots.py [--logs FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_tuner

import keras_distill as kd

IMAGES = Path(__file__).absolute().parent / "images"
DATA = kd.datasets.load("digits")
FIT = {"validation_data": DATA.validation, "batch_size": 100, "verbose": 0}

# Page: logs, width and height in pixels, what stands behind the # of the address.
PAGES = {
    "scalars": ("distiller", 1500, 1350, "scalars&tagFilter=epoch_"),
    "custom-scalars": ("distiller", 1500, 2150, "custom_scalars"),
    "images": ("distiller", 1500, 1200, "images"),
    "gates": ("one", 1500, 560, "histograms"),
    "branches": ("one", 1500, 1800, "custom_scalars"),
    "hparams": ("search", 1500, 700, "hparams"),
}


def net(width: int) -> keras.Model:
    """Two convolutions and a dense layer."""
    return keras.Sequential(
        [
            keras.Input(DATA.input_shape),
            keras.layers.Conv2D(width, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(
                2 * width, 3, 2, padding="same", activation="relu", name="features"
            ),
            keras.layers.Flatten(),
            keras.layers.Dense(DATA.num_classes),
        ]
    )


def compiled() -> dict[str, Any]:
    """What every model here is compiled with."""
    return {
        "optimizer": keras.optimizers.Adam(3e-3),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
    }


def callbacks(folder: Path, **board: Any) -> list[Any]:
    """The stock callback and ours beside it."""
    return [
        keras.callbacks.TensorBoard(os.fspath(folder), write_graph=False),
        kd.monitoring.DistillationBoard(validation_data=DATA.validation, **board),
    ]


def distiller(teacher: keras.Model, folder: Path) -> None:
    """Soft targets and a link; the temperature falls and alpha rises."""
    link = kd.Link("features", "features", kd.losses.AttentionTransfer(), weight=10.0)
    model = kd.Distiller(net(2), teacher, links=[link])
    model.compile(**compiled(), log_gradient_share=5)
    model.fit(
        *DATA.train,
        **FIT,
        epochs=15,
        callbacks=[
            kd.schedules.Schedule("temperature", lambda epoch: 8 - epoch / 2),
            kd.schedules.Schedule("alpha", lambda epoch: 0.1 + 0.02 * epoch),
            *callbacks(folder, attention=("features", "features")),
        ],
    )


def one(folder: Path) -> None:
    """Three branches and a gate."""
    model = kd.OneEnsemble.from_model(net(4), "features", num_branches=3)
    model.compile(**compiled())
    model.fit(*DATA.train, **FIT, epochs=10, callbacks=callbacks(folder))


def search(teacher: keras.Model, folder: Path) -> None:
    """Twelve trials."""
    model = kd.tuning.DistillationHyperModel(lambda: net(2), teacher, **compiled())
    with tempfile.TemporaryDirectory() as directory:
        tuner = keras_tuner.RandomSearch(
            model, "val_accuracy", max_trials=12, seed=0, directory=directory
        )
        tuner.search(*DATA.train, **FIT, epochs=4, callbacks=callbacks(folder))
        kd.tuning.plot(tuner, IMAGES / "trials.png")


def take(browser: str, url: str, width: int, height: int, path: Path) -> None:
    """A picture of a page, after the time that its scripts and charts take."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                "--virtual-time-budget=30000",
                f"--screenshot={path}",
                url,
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )


def main() -> None:
    """Trains, serves and takes the pictures."""
    from tensorboard import program

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=Path, help="logs of an earlier run, or for one")
    options = parser.parse_args()
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        parser.error(f"no browser: looked for {', '.join(names)}")
    logs = (options.logs or Path(tempfile.mkdtemp()) / "logs").absolute()
    IMAGES.mkdir(exist_ok=True)
    if not logs.exists() or not any(logs.iterdir()):
        keras.utils.set_random_seed(0)
        teacher = net(16)
        teacher.compile(**compiled())
        teacher.fit(*DATA.train, batch_size=100, epochs=10, verbose=0)
        distiller(teacher, logs / "distiller")
        one(logs / "one")
        search(teacher, logs / "search")
    urls = {}
    os.chdir(logs.parent)  # the pages show the folder as it was given
    for folder in sorted(logs.iterdir()):
        server = program.TensorBoard()
        given = os.fspath(folder.relative_to(logs.parent))
        server.configure(argv=[None, "--logdir", given, "--port", "0"])
        urls[folder.name] = server.launch()
    for page, (folder, width, height, address) in PAGES.items():
        path = IMAGES / f"{page}.png"
        take(browser, f"{urls[folder]}#{address}", width, height, path)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
