"""Searches with keras-tuner."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys

import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras_tuner.errors import FatalError

import keras_distill as kd
from keras_distill import tuning
from keras_distill.tuning.results import importance

X, Y = tiny.data(24)
VALIDATION = tiny.data(12, seed=1)


def hypermodel(build=tiny.mlp, known=None, **kwargs):
    """A model of a search; its trials run eagerly unless `distiller` is given."""
    kwargs = {
        "optimizer": keras.optimizers.SGD(0.1),
        "loss": tiny.SPARSE,
        "metrics": ["accuracy"],
        "distiller": Eager,
    } | kwargs
    return tuning.DistillationHyperModel(build, known or tiny.teacher(), **kwargs)


def hint(**kwargs):
    """A link between the hidden layers."""
    return kd.Link("hidden", "hidden", kd.losses.Hint(), adapter="auto", **kwargs)


class Eager(kd.Distiller):
    """Without tracing: a trial takes milliseconds."""

    def compile(self, *args, **kwargs):
        return super().compile(*args, run_eagerly=True, **kwargs)


def search(model, folder, tuner=keras_tuner.RandomSearch, objective=None, **kwargs):
    """A quiet search of up to 3 trials of one epoch."""
    options = {"max_trials": 3, "seed": 1}
    fit = {"validation_data": VALIDATION, "epochs": 1, "batch_size": 12, "verbose": 0}
    for key, value in kwargs.items():
        (options if key in ("max_trials", "num_initial_points") else fit)[key] = value
    made = tuner(
        model,
        objective=objective or tuning.objective("val_hard_loss"),
        directory=folder,
        project_name="search",
        **options,
    )
    made.search(X, Y, **fit)
    return made


def test_optional_packages_are_imported_only_when_used():
    code = (
        "import sys, keras; before = set(sys.modules); "  # Keras itself imports some
        "import keras_distill as kd, keras_distill.datasets, keras_distill.report; "
        "names = {'tensorflow_datasets', 'keras_tuner', 'matplotlib', 'sklearn'}; "
        "print(names & (set(sys.modules) - before)); "
        "kd.tuning.Choice; assert 'keras_tuner' in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# -- what is searched ----------------------------------------------------------------


def test_ranges_choices_and_fixed_values():
    model = hypermodel(temperature=(2, 8), alpha=tuning.Choice([0, 0.5]), beta=0.25)
    hp = keras_tuner.HyperParameters()
    made = model.build(hp)
    temperature, alpha = hp.space
    assert (temperature.min_value, temperature.max_value) == (2, 8)
    assert temperature.sampling == "log"
    assert alpha.values == [0, 0.5]
    assert float(made.beta.numpy()) == 0.25
    hp.values |= {"temperature": 5.0, "alpha": 0.0}
    made = model.build(hp)
    assert made.temperature.numpy() == 5
    assert made.alpha.numpy() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": (4, 4)}, "`temperature` must be a range .* low < high"),
        ({"temperature": (8, 2)}, "`temperature` must be a range .* low < high"),
        ({"temperature": (0, 2)}, "`temperature` must be finite and above 0"),
        ({"temperature": -1}, "`temperature` must be finite and above 0"),
        ({"alpha": (-1, 1)}, "`alpha` must be finite and at least 0"),
        ({"beta": (0, float("inf"))}, "`beta` must be finite"),
        ({"beta": (0, 1, 2)}, "`beta` must be a range"),
        ({"alpha": 0, "beta": 0}, "nothing to learn from"),
        ({"soft_loss": None, "beta": 0.5, "alpha": 1}, "`beta` has no effect"),
        ({"soft_loss": kd.losses.LogitMSE(), "temperature": 3}, "`temperature` has no"),
    ],
)
def test_bad_ranges_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hypermodel(**arguments)


def test_other_kinds_of_arguments_are_refused():
    with pytest.raises(TypeError, match="`alpha` must be a range"):
        hypermodel(alpha=[0, 1])
    with pytest.raises(TypeError, match="`build_student` must be a function"):
        hypermodel(build=tiny.mlp())
    with pytest.raises(ValueError, match="at least one value"):
        tuning.Choice([])
    with pytest.raises(ValueError, match="must differ"):
        tuning.Choice([1, 1])


def test_other_classes_are_an_error_when_the_tuner_is_made(tmp_path):
    teacher = keras.Sequential([keras.Input((tiny.FEATURES,)), keras.layers.Dense(5)])
    with pytest.raises(ValueError, match="3 classes in the student and 5 in the"):
        search(hypermodel(known=teacher), tmp_path)


def test_a_student_that_is_not_new_is_refused(tmp_path):
    student = tiny.mlp()
    model = hypermodel(lambda: student)
    model.build(keras_tuner.HyperParameters())
    with pytest.raises(ValueError, match="the same model again"):
        model.build(keras_tuner.HyperParameters())


def test_adapters_are_not_shared_by_trials():
    link = kd.Link("hidden", "hidden", kd.losses.Hint(), adapter=keras.layers.Dense(12))
    with pytest.raises(ValueError, match="All trials would share the adapter"):
        hypermodel(links=[link])
    made = [
        hypermodel(links=[hint()]).build(keras_tuner.HyperParameters())
        for _ in range(2)
    ]
    assert made[0].links[0].adapter is not made[1].links[0].adapter


def test_losses_students_links_and_optimizers_may_depend_on_the_trial():
    def build(hp):
        return tiny.mlp(hp.Int("width", 3, 9))

    def links(hp):
        weight = hp.Float("hint", 0.5, 2.0)
        return [hint(weight=weight, name="hint")]

    decoupled = kd.losses.DecoupledKD()
    model = hypermodel(
        build,
        soft_loss=tuning.Choice(
            ["auto", decoupled, kd.losses.LogitMSE(), kd.losses.LogitMSE("none")]
        ),
        links=links,
        optimizer=lambda hp: keras.optimizers.SGD(hp.Choice("rate", [0.5, 0.25])),
    )
    hp = keras_tuner.HyperParameters()
    hp.values |= {
        "width": 7,
        "hint": 1.5,
        "soft_loss": "DecoupledKD",
        "temperature": 3.0,
        "rate": 0.25,
    }
    made = model.build(hp)
    assert isinstance(made.soft_loss, kd.losses.DecoupledKD)
    assert made.temperature.numpy() == 3
    assert decoupled.temperature == 4  # the user's is not changed
    assert made.student.get_layer("hidden").units == 7
    assert made.term_weights["hint"].numpy() == 1.5
    assert made.optimizer.learning_rate.numpy() == 0.25
    hp.values["soft_loss"] = "LogitMSE 2"
    made = model.build(hp)
    assert isinstance(made.soft_loss, kd.losses.LogitMSE)
    assert made.soft_loss.reduction == "none"


# -- searches ------------------------------------------------------------------------


def hyperband(model, folder):
    tuner = keras_tuner.Hyperband(
        model,
        tuning.objective("val_hard_loss"),
        directory=folder,
        project_name="search",
        seed=1,
        max_epochs=2,
        factor=2,
    )
    tuner.search(X, Y, validation_data=VALIDATION, batch_size=24, verbose=0)
    return tuner


def bayesian(model, folder):  # the first trials are random
    tuner = keras_tuner.BayesianOptimization
    return search(model, folder, tuner, max_trials=4, num_initial_points=3)


@pytest.mark.parametrize("run", [search, hyperband, bayesian])
def test_every_tuner_finds_the_best_of_its_trials(run, tmp_path):
    teacher = tiny.teacher()
    before = tiny.values(teacher.weights)
    tuner = run(hypermodel(known=teacher, alpha=0.5), tmp_path)
    rows = tuning.results(tuner)
    assert len(rows) >= 3
    assert {row["status"] for row in rows} == {"COMPLETED"}
    scores = [row["val_hard_loss"] for row in rows]
    assert scores == sorted(scores)
    assert len({row["temperature"] for row in rows}) > 2
    best = tuning.best_distiller(tuner)
    logs = best.evaluate(*VALIDATION, batch_size=12, verbose=0, return_dict=True)
    assert logs["hard_loss"] == pytest.approx(scores[0], rel=1e-5)
    assert best.temperature.numpy() == pytest.approx(rows[0]["temperature"])
    assert best.teacher.model is teacher
    assert tiny.same(before, tiny.values(teacher.weights))


def test_a_grid_skips_what_would_learn_nothing(tmp_path):
    choice = tuning.Choice([0, 1])
    model = hypermodel(
        lambda hp: tiny.mlp(hp.Choice("width", [3, 4])),
        temperature=2,
        alpha=choice,
        beta=choice,
    )
    grid = keras_tuner.GridSearch
    tuner = search(model, tmp_path, grid, max_trials=None, batch_size=24)
    rows = tuning.results(tuner)
    assert len(rows) == 8
    failed = [row for row in rows if row["status"] == "FAILED"]
    assert len(failed) == 2
    assert all(row["alpha"] == row["beta"] == 0 for row in failed)
    assert all("nothing to learn" in row["message"] for row in failed)
    assert all(row["val_hard_loss"] is None for row in failed)
    assert rows[-2:] == failed


def test_one_cache_serves_all_trials(tmp_path, monkeypatch):
    rows = []
    run = kd.teachers.Model.__call__

    def note(x):
        rows.append(len(x))
        return x

    def counting(self, x, *args):  # also inside a graph
        noted = tf.numpy_function(note, [x], tf.float32)
        return run(self, tf.ensure_shape(noted, (None, tiny.FEATURES)), *args)

    monkeypatch.setattr(kd.teachers.Model, "__call__", counting)
    teacher = tiny.teacher()
    search(hypermodel(known=teacher), tmp_path / "live", max_trials=2, epochs=2)
    assert sum(rows) == 24 * 2 * 2
    rows.clear()
    options = {"known": teacher, "cache": tmp_path / "cache", "links": lambda: [hint()]}
    tuner = search(hypermodel(**options), tmp_path, max_trials=2, epochs=2)
    assert rows == [1, 24]  # one row shows what there is to store
    assert {row["status"] for row in tuning.results(tuner)} == {"COMPLETED"}
    # The best distiller goes on with the teacher itself.
    assert isinstance(tuning.best_distiller(tuner).teacher, kd.teachers.Model)
    # Another search finds the cache finished, and a data set does as arrays do.
    rows.clear()
    other = hypermodel(**options)
    made = other.build(keras_tuner.HyperParameters())
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    history = other.fit(None, made, data, batch_size=12, verbose=0).history
    assert not rows
    assert history["soft_loss"][0] > 0


def test_a_trial_with_a_cache_learns_what_one_without_does(tmp_path):
    teacher = tiny.teacher()
    fitted = []
    for cache in (None, tmp_path):
        keras.utils.set_random_seed(0)
        model = hypermodel(known=teacher, cache=cache, temperature=2, alpha=1, beta=1)
        made = model.build(keras_tuner.HyperParameters())
        model.fit(None, made, X, Y, batch_size=12, verbose=0, shuffle=False)
        fitted.append(tiny.values(made.student.weights))
    for one, other in zip(*fitted, strict=True):  # the cache holds float16
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_a_list_of_arrays_is_several_inputs(tmp_path):
    def two(width=4):
        inputs = [keras.Input((tiny.FEATURES,)) for _ in range(2)]
        hidden = keras.layers.Dense(width)(keras.layers.Add()(inputs))
        return keras.Model(inputs, keras.layers.Dense(tiny.CLASSES)(hidden))

    model = hypermodel(two, two(8), cache=tmp_path)
    made = model.build(keras_tuner.HyperParameters())
    validation = {"validation_data": ([X, X], Y), "validation_batch_size": 12}
    history = model.fit(None, made, [X, X], Y, verbose=0, **validation).history
    assert np.isfinite(history["soft_loss"] + history["val_hard_loss"]).all()
    temperature = kd.teachers.suggest_temperature(two(8), [X, X])
    assert 0 < temperature < np.inf


def test_each_trial_finds_the_cache_of_what_it_asks_for(tmp_path):
    def links(hp):
        layer = hp.Choice("layer", ["hidden", "logits"])
        return [kd.Link(layer, f"0/{layer}", "mse", adapter="auto", name="link")]

    both = [tiny.teacher(), tiny.mlp()]  # other outputs at each temperature
    with pytest.raises(ValueError, match="one `temperature` or a Choice"):
        hypermodel(known=both, cache=tmp_path / "cache")
    options = {"temperature": tuning.Choice([2, 4]), "alpha": 0.1, "beta": 0.9}
    model = hypermodel(known=both, cache=tmp_path / "cache", links=links, **options)
    tuner = search(model, tmp_path, keras_tuner.GridSearch, max_trials=None)
    rows = tuning.results(tuner)
    assert len(rows) == 4
    assert {row["status"] for row in rows} == {"COMPLETED"}
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_batched_data_do_not_go_with_a_cache(tmp_path):
    model = hypermodel(cache=tmp_path / "cache")
    made = model.build(keras_tuner.HyperParameters())
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    with pytest.raises(FatalError, match="The teacher's cache: .*batch"):
        model.fit(None, made, data, verbose=0)


def test_with_tensorboard_every_trial_has_its_folder(tmp_path):
    model = hypermodel(distiller=kd.Distiller)
    board = kd.monitoring.DistillationBoard(validation_data=VALIDATION)
    callbacks = [keras.callbacks.TensorBoard(tmp_path / "logs"), board]
    search(model, tmp_path, max_trials=2, callbacks=callbacks)
    for trial in "01":
        folder = tmp_path / "logs" / trial / "execution0" / "distillation"
        assert list(folder.glob("events.*"))


# -- the folder ----------------------------------------------------------------------


def test_a_search_goes_on_in_its_folder_and_nowhere_else(tmp_path):
    def build(hp):
        return tiny.mlp(hp.Int("width", 3, 4))

    space = {"build": build, "alpha": 0.5, "beta": (0.1, 1)}
    search(hypermodel(**space), tmp_path, max_trials=1)
    tuner = search(hypermodel(**space), tmp_path, max_trials=2)
    assert len(tuning.results(tuner)) == 2
    note = tmp_path / "search" / "distillation.json"
    assert [path.name for path in note.parent.glob("distillation*")] == [note.name]

    def refused(message, objective=None, **changed):
        changed = hypermodel(**space | changed)
        folder = tmp_path / "copy"
        shutil.copytree(tmp_path / "search", folder / "search")
        # A finished search asks for no trial: then the results are refused.
        finished = search(changed, folder, max_trials=2, objective=objective)
        for ask in (tuning.results, tuning.best_distiller):
            with pytest.raises(ValueError, match=message):
                ask(finished)
        with pytest.raises(FatalError, match=message):
            search(changed, folder, max_trials=3, objective=objective)
        shutil.rmtree(folder)

    refused("another search: another teacher. Give", known=tiny.teacher(5))
    refused("another space, alpha. Give", alpha=(0.5, 1))
    refused("another alpha. Give", alpha=0.25)
    refused("another space. Give", build=lambda hp: tiny.mlp(hp.Int("width", 2, 4)))
    refused("another objective. Give", tuning.objective("val_accuracy"))
    note.unlink()  # as a search without a teacher leaves it
    refused("another hypermodel. Give")


def test_a_cache_that_cannot_be_written_ends_the_search(tmp_path):
    (tmp_path / "file").touch()
    model = hypermodel(cache=tmp_path / "file" / "cache")
    with pytest.raises(FatalError, match="The teacher's cache: .*file/cache"):
        search(model, tmp_path)


# -- the objective -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("val_hard_loss", "min"),
        ("val_loss", "min"),
        ("val_digits_loss", "min"),  # of one output of several
        ("val_accuracy", "max"),
        ("val_agreement", "max"),
    ],
)
def test_the_direction_of_an_objective_is_known(name, direction):
    assert tuning.objective(name) == keras_tuner.Objective(name, direction)


def test_objectives_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="cannot be the objective: it is a training"):
        tuning.objective("soft_loss")
    with pytest.raises(ValueError, match="not known whether 'val_charm'"):
        tuning.objective("val_charm")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("val_charm", "no log 'val_charm'.*There are: .*val_accuracy.*val_hard_loss"),
        ("loss", "'loss' cannot be the objective.*val_accuracy"),
        ("soft_loss", "'soft_loss' cannot be the objective"),
        ("val_soft_loss", "'val_soft_loss' cannot be the objective"),
    ],
)
def test_the_objective_is_checked_before_the_first_step(name, message, tmp_path):
    steps = []
    note = keras.callbacks.Callback()
    note.on_train_batch_begin = lambda batch, logs=None: steps.append(batch)
    with pytest.raises(FatalError, match=message):
        search(
            hypermodel(),
            tmp_path,
            objective=keras_tuner.Objective(name, "min"),
            callbacks=[note],
        )
    assert not steps


def test_without_validation_data_the_error_says_so(tmp_path):
    with pytest.raises(FatalError, match="There are no validation data"):
        search(hypermodel(), tmp_path, validation_data=None)


@pytest.mark.parametrize("name", ["val_loss", "val_accuracy", "accuracy", "hard_loss"])
def test_what_can_be_compared_may_be_the_objective(name, tmp_path):
    tuner = search(
        hypermodel(), tmp_path, objective=tuning.objective(name), max_trials=1
    )
    assert tuning.results(tuner)[0][name] is not None


# -- results -------------------------------------------------------------------------


def test_results_are_a_table_a_csv_and_a_figure(tmp_path):
    tuner = search(hypermodel(), tmp_path)
    table = tuning.results(tuner)
    assert str(table).splitlines()[0].split()[:3] == [
        "trial",
        "status",
        "val_hard_loss",
    ]
    assert len(str(table).splitlines()) == 2 + len(table)
    table.to_csv(tmp_path / "trials.csv")
    with open(tmp_path / "trials.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["alpha"]) for row in read] == [row["alpha"] for row in table]
    tuning.plot(tuner, tmp_path / "plot.png")
    image = tf.io.decode_png((tmp_path / "plot.png").read_bytes())
    assert image.shape[0] > 100
    assert np.ptp(image.numpy()) > 100


def test_how_much_a_parameter_mattered():
    from types import SimpleNamespace

    def trial(index, score, **values):
        return SimpleNamespace(
            trial_id=str(index),
            status="COMPLETED",
            score=score,
            best_step=0,
            message=None,
            hyperparameters=SimpleNamespace(values=values),
        )

    scores = [0.1, 0.2, 0.4, 0.8]
    trials = [
        trial(i, score, temperature=float(10**i), name="ab"[i % 2], fixed=1)
        for i, score in enumerate(scores)
    ]
    oracle = SimpleNamespace(
        objective=keras_tuner.Objective("val_accuracy", "max"),
        trials={t.trial_id: t for t in trials},
    )
    found = importance(SimpleNamespace(oracle=oracle))
    assert found["temperature"] == pytest.approx(1)  # monotone
    assert found["name"] == pytest.approx(0.2)  # means 1 and 2 of the ranks 0 to 3
    assert "fixed" not in found


def test_a_search_without_a_good_trial_has_no_best(tmp_path):
    tuner = keras_tuner.RandomSearch(
        hypermodel(), "val_accuracy", directory=tmp_path, max_trials=1
    )
    with pytest.raises(ValueError, match="No trial of this search has ended well"):
        tuning.best_distiller(tuner)
    with pytest.raises(ValueError, match="At least two trials"):
        tuning.plot(tuner, tmp_path / "plot.png")


def test_a_search_takes_what_fit_takes_by_position(tmp_path):
    seen = {}

    class Noting(Eager):
        def fit(self, *args, **kwargs):
            seen.update(kwargs)
            return super().fit(*args, **kwargs)

    model = hypermodel(distiller=Noting, soft_loss=tuning.Choice(["auto", None]))
    tuner = keras_tuner.RandomSearch(
        model,
        tuning.objective("val_hard_loss"),
        max_trials=2,
        directory=tmp_path,
        project_name="search",
    )
    tuner.search(X, Y, 6, 2, 0, validation_data=VALIDATION)
    assert (seen["batch_size"], seen["epochs"], seen["verbose"]) == (6, 2, 0)
    trials = list(tuner.oracle.trials.values())
    trials[0].score, trials[1].score = float("nan"), 0.5
    assert tuning.results(tuner)[0]["trial"] == trials[1].trial_id
