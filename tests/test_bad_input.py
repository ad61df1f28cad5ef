"""Bad input: one clear error that names the argument, and what it should be."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd


def test_models_must_be_models():
    with pytest.raises(TypeError, match="`student` must be a keras.Model"):
        kd.Distiller("student", tiny.teacher())
    with pytest.raises(TypeError, match="`teacher` must be a keras.Model, a list"):
        kd.Distiller(tiny.mlp(), 3)
    with pytest.raises(TypeError, match=r"teacher must be a keras.Model"):
        kd.teachers.Model("teacher")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_model_that_was_never_built(side):
    fresh = keras.Sequential([keras.layers.Dense(3)], name="fresh")
    pair = [tiny.mlp(), fresh] if side == "teacher" else [fresh, tiny.teacher()]
    with pytest.raises(ValueError, match="'fresh' was never built.*Call it once"):
        kd.Distiller(*pair)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_temperature(value):
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        tiny.distiller(temperature=value)
    distiller = tiny.distiller()
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        distiller.temperature = value
    assert distiller.temperature.numpy() == 4


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_alpha_and_beta(name, value):
    match = "must be finite and at least 0. Received"
    with pytest.raises(ValueError, match=f"`({name}|hard|soft)` {match}"):
        tiny.distiller(**{name: value})
    distiller = tiny.distiller()
    before = getattr(distiller, name).numpy()
    with pytest.raises(ValueError, match=match):
        setattr(distiller, name, value)
    assert getattr(distiller, name).numpy() == before


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weight_of_a_link(value):
    match = "must be finite and at least 0. Received"
    with pytest.raises(ValueError, match=f"`weight` {match}"):
        kd.Link("hidden", "hidden", "mse", weight=value)
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    with pytest.raises(ValueError, match=f"`hidden` {match}"):
        tiny.distiller(links=[link]).term_weights["hidden"] = value


def test_class_counts_that_differ():
    other = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, name="hidden")])
    with pytest.raises(
        ValueError, match="3 classes in the student and 5 in the teacher"
    ):
        kd.Distiller(tiny.mlp(), other)
    links = [kd.Link("hidden", "hidden", "mse", adapter="auto")]
    kd.Distiller(tiny.mlp(), other, soft_loss=None, links=links)


def test_outputs_without_a_common_name():
    inputs = keras.Input((6,))

    def two(*names):
        return keras.Model(inputs, {n: keras.layers.Dense(3)(inputs) for n in names})

    with pytest.raises(
        ValueError, match=r"no output in common. Student: \['a', 'b'\], teacher: \['c'"
    ):
        kd.Distiller(two("a", "b"), two("c", "d"))


def test_outputs_of_other_shapes():
    def sequence(steps):
        return keras.Sequential([keras.Input((steps, 2)), keras.layers.Dense(3)])

    with pytest.raises(ValueError, match=r"shape \(None, 4, 3\).*\(None, 5, 3\)"):
        kd.Distiller(sequence(4), sequence(5))
    with pytest.raises(ValueError, match="has shape"):
        kd.Distiller(sequence(4), sequence(5), soft_loss="mse")


@pytest.mark.parametrize("loss", ["mse", kd.losses.Hint()])
def test_taps_of_other_shapes_without_adapter(loss):
    link = kd.Link("hidden", "hidden", loss)
    with pytest.raises(ValueError, match=r"^The link 'hidden'(?s:.*)8(?s:.*)adapter"):
        tiny.distiller(links=[link])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_layers_that_do_not_exist(side):
    layers = ["hiden", "hidden"] if side == "student" else ["hidden", "hiden"]
    match = rf"`{side}_layer`: there is no layer 'hiden'.*Nearest names: \['hidden'\]"
    with pytest.raises(ValueError, match=match):
        tiny.distiller(links=[kd.Link(*layers, "mse")])


def test_paths_into_nested_models():
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="in")])
    inner.name = "backbone"
    inputs = keras.Input((6,))
    student = keras.Model(inputs, inner(inputs))
    with pytest.raises(ValueError, match="no layer 'im' in 'backbone'"):
        kd.Distiller(
            student, tiny.teacher(), links=[kd.Link("backbone/im", "logits", "mse")]
        )


def test_layer_objects_of_another_model():
    foreign = tiny.mlp().get_layer("hidden")
    with pytest.raises(ValueError, match="'hidden' is not part of the model"):
        tiny.distiller(links=[kd.Link(foreign, "hidden", "mse")])


def test_paths_in_an_ensemble():
    link = kd.Link("hidden", "hidden", "mse")
    with pytest.raises(
        ValueError, match="a path begins with the teacher's index, 0 to 1"
    ):
        tiny.distiller(known=[tiny.mlp(), tiny.mlp()], links=[link])


@pytest.mark.parametrize("layer", [None, [], 3])
def test_a_link_between_no_layers(layer):
    with pytest.raises(TypeError, match="`teacher_layer` must be a layer's name"):
        kd.Link("hidden", layer, "mse")
    with pytest.raises(TypeError, match="`student_layer` must be a layer's name"):
        kd.Link(layer, "hidden", "mse")


def test_other_arguments_of_a_link():
    with pytest.raises(TypeError, match="`loss` must be a Keras loss"):
        kd.Link("a", "b", None)
    with pytest.raises(TypeError, match="`adapter` must be None, 'auto' or a keras"):
        kd.Link("a", "b", "mse", adapter="dense")
    with pytest.raises(TypeError, match="`teacher_adapter` must be None or a keras"):
        kd.Link("a", "b", "mse", teacher_adapter="auto")
    with pytest.raises(TypeError, match="`links` must hold kd.Link objects"):
        tiny.distiller(links=["hidden"])


@pytest.mark.parametrize("name", ["loss", "hard", "soft", "agreement", "logits"])
def test_names_of_links_that_are_taken(name):
    link = kd.Link("hidden", "hidden", "mse", adapter="auto", name=name)
    with pytest.raises(ValueError, match=f"link name '{name}' is taken.*Give `name=`"):
        tiny.distiller(links=[link])


def test_two_links_of_one_name():
    links = [kd.Link("hidden", "hidden", "mse", adapter="auto") for _ in range(2)]
    with pytest.raises(ValueError, match="link name 'hidden' is taken"):
        tiny.distiller(links=links)


# -- arguments without effect ----------------------------------------------------------


def test_arguments_without_effect():
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    for name, value in (("temperature", 2.0), ("beta", 0.5)):
        with pytest.raises(
            ValueError, match=f"`{name}` has no effect with `soft_loss=N"
        ):
            tiny.distiller(soft_loss=None, links=[link], **{name: value})
    with pytest.raises(ValueError, match="`output_weights` has no effect"):
        tiny.distiller(soft_loss=None, links=[link], output_weights=[1.0])
    with pytest.raises(ValueError, match="`student_from_logits` has no effe"):
        tiny.distiller(soft_loss=None, links=[link], student_from_logits=True)
    with pytest.raises(ValueError, match="`temperature` belongs to `soft_loss='auto'`"):
        tiny.distiller(soft_loss=kd.losses.SoftTarget(), temperature=2.0)


@pytest.mark.parametrize(
    "loss", [kd.losses.ConfidencePenalty(), kd.losses.VirtualTeacher()]
)
def test_losses_without_a_teacher(loss):
    with pytest.raises(ValueError, match="needs no teacher"):
        tiny.distiller(soft_loss=loss)
    with pytest.raises(ValueError, match="needs no teacher"):
        tiny.distiller(links=[kd.Link("logits", "logits", loss, name="top")])


def test_losses_with_several_temperatures_and_arithmetic_ensembles():
    teachers = [tiny.mlp(), tiny.mlp()]
    loss = kd.losses.MultiLevelLogit()
    with pytest.raises(ValueError, match="several temperatures.*combine='geometric'"):
        tiny.distiller(known=teachers, soft_loss=loss)
    geometric = kd.teachers.Ensemble(teachers, combine="geometric")
    tiny.distiller(known=geometric, soft_loss=loss)


def test_what_changes_the_scale_and_arithmetic_ensembles():
    teachers = [tiny.mlp(), tiny.mlp()]
    geometric = kd.teachers.Ensemble(teachers, combine="geometric")
    standardized = kd.losses.SoftTarget(2.0, standardize=True)
    with pytest.raises(ValueError, match="changes the scale.*combine='geometric'"):
        tiny.distiller(known=teachers, soft_loss=standardized)
    tiny.distiller(known=geometric, soft_loss=standardized)
    with pytest.raises(ValueError, match="learned temperature.*combine='geometric'"):
        tiny.distiller(known=teachers, temperature=kd.LearnedTemperature())
    tiny.distiller(known=geometric, temperature=kd.LearnedTemperature())


@pytest.mark.parametrize("argument", ["alpha", "beta"])
def test_an_error_of_a_weight_names_its_argument(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be finite"):
        tiny.distiller(**{argument: -1.0})
    distiller = tiny.distiller()
    with pytest.raises(ValueError, match=f"`{argument}` must be finite"):
        setattr(distiller, argument, -1.0)


def test_output_weights():
    with pytest.raises(ValueError, match=r"one weight per output \['logits'\]"):
        tiny.distiller(output_weights=[1.0, 2.0])
    with pytest.raises(
        ValueError, match=r"names \['x'\]; the outputs are \['logits'\]"
    ):
        tiny.distiller(output_weights={"x": 1.0})
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        tiny.distiller(output_weights=[-1.0])


def test_shared_variables():
    model = tiny.mlp()
    with pytest.raises(ValueError, match="share variables.*Clone one of them"):
        kd.Distiller(model, model)
    with pytest.raises(ValueError, match="share variables"):
        tiny.distiller(model).teacher = keras.Model(model.inputs, model.outputs)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"models": []}, "at least one model"),
        ({"combine": "sum"}, "'arithmetic' or 'geometric'. Received: 'sum'"),
        ({"weights": [1.0]}, r"one weight per model \(2\)"),
        ({"weights": [1.0, -1.0]}, "at least 0"),
        ({"weights": [0.0, 0.0]}, "must not all be 0"),
        ({"models": "differ"}, "differ in their outputs"),
    ],
)
def test_ensembles(arguments, match):
    models = [tiny.mlp(), tiny.mlp()]
    if arguments.get("models") == "differ":
        other = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
        arguments = {"models": [models[0], other]}
    with pytest.raises(ValueError, match=match):
        kd.teachers.Ensemble(**({"models": models} | arguments))


# -- compile and fit -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"log_gradient_share": -1}, "number of steps, 0 for never. Received: -1"),
        ({"across_replicas": True}, "no effect on one replica"),
        ({"gradient_policy": kd.ClipToMain()}, "has no effect.* has no links"),
        ({"check_finite": True, "jit_compile": True}, "XLA has no assertions"),
    ],
)
def test_options_of_compile(options, match):
    with pytest.raises(ValueError, match=match):
        tiny.distiller().compile("sgd", tiny.SPARSE, **options)


def test_no_loss_at_all():
    x, y = tiny.data(8)
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.distiller(soft_loss=None, links=[link])
    tiny.compiled(distiller, loss=None)
    with pytest.raises(ValueError, match="There is no loss to compute"):
        distiller.evaluate(x, y, verbose=0)


@pytest.mark.parametrize(
    "table", [{}, {0: -1.0}, {0: float("nan")}, {-1: 1.0}, {0.5: 1.0}]
)
def test_class_weights(table):
    distiller = tiny.compiled(tiny.distiller())
    with pytest.raises(ValueError, match="`class_weight` must map classes"):
        tiny.history(distiller, *tiny.data(8), class_weight=table)


def test_class_weights_without_labels():
    distiller = tiny.compiled(tiny.distiller())
    with pytest.raises(ValueError, match="`class_weight` needs labels"):
        tiny.history(distiller, tiny.data(8)[0], class_weight={0: 1.0})
    distiller = tiny.compiled(tiny.distiller(), loss="mse")
    x, _ = tiny.data(8)
    with pytest.raises(ValueError, match="needs labels that are classes"):
        tiny.history(distiller, x, np.zeros((8, 3)), class_weight={0: 1.0})


def test_data_whose_structure_does_not_fit():
    x, y = tiny.data(8)
    distiller = tiny.compiled(tiny.distiller(student_inputs="small"))
    with pytest.raises(ValueError, match=r"no input \['small'\]. Inputs: \['large'\]"):
        tiny.history(distiller, {"large": x}, y)
    distiller = tiny.compiled(tiny.distiller())
    with pytest.raises(
        ValueError, match=r"no outputs named \['a'\]. Outputs: \['logits"
    ):
        tiny.history(distiller, x, {"a": y})
    with pytest.raises(ValueError, match=r"outputs \['logits'\].*hold 2 arrays"):
        tiny.history(distiller, x, (y, y))


def test_sample_weights_that_do_not_fit():
    x, y = tiny.data(8)
    distiller = tiny.compiled(tiny.distiller())
    with pytest.raises(
        ValueError, match=r"`sample_weight` of shape \(8, 5\) does not fit"
    ):
        tiny.history(distiller, x, y, sample_weight=np.ones((8, 5), "float32"))


def test_losses_that_need_labels_without_any():
    distiller = tiny.compiled(tiny.distiller(soft_loss=kd.losses.DecoupledKD()))
    with pytest.raises(ValueError, match="DecoupledKD needs labels; there are none"):
        tiny.history(distiller, tiny.data(8)[0])


def test_losses_across_rows_need_more_than_one():
    x, y = tiny.data(1)
    distiller = tiny.compiled(tiny.distiller(soft_loss=kd.losses.DIST()))
    with pytest.raises(ValueError, match="row"):
        tiny.history(distiller, x, y)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_teacher_outputs(value):
    x, y = tiny.data(16)
    teacher = tiny.linear()
    x[12] = value
    distiller = tiny.compiled(tiny.distiller(known=teacher), check_finite=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="hold NaN or infinity"):
        tiny.history(distiller, x, y, batch_size=8)


def test_lower_precision_for_subclassed_teachers():
    class Own(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.top = keras.layers.Dense(3)

        def call(self, x):
            return self.top(x)

    model = Own()
    model(np.zeros((1, 6), "float32"))
    with pytest.raises(
        ValueError, match="`dtype` needs a functional.*'own' is a subcl"
    ):
        kd.teachers.Model(model, dtype="bfloat16")


def test_logs_that_were_not_declared():
    class Wrong(kd.BaseDistiller):
        def compute_terms(self, x, y, sample_weight, training):
            outputs = self.run_student(x, training)
            self.log_metric("unknown", outputs[:, 0])
            return outputs, {}

    with pytest.raises(ValueError, match="no log 'unknown'"):
        tiny.history(tiny.compiled(Wrong(tiny.mlp())), *tiny.data(8))


def test_terms_of_one_name():
    class Wrong(kd.BaseDistiller):
        def __init__(self, student):
            super().__init__(student)
            self.add_term("hard")

    with pytest.raises(ValueError, match="There is a term 'hard' already"):
        Wrong(tiny.mlp())
