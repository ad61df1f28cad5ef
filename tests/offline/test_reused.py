"""ReusedTeacherClassifier: the deployed model is the trained one."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny
from offline import nets

import keras_distill as kd


@pytest.fixture(scope="module")
def trained(teacher, digits):
    keras.utils.set_random_seed(6)
    distiller = kd.ReusedTeacherClassifier(
        nets.net(3), teacher, features=("relu2", "relu3")
    )
    distiller.compile(
        keras.optimizers.Adam(0.01),
        nets.SPARSE,
        metrics=["accuracy"],
        run_eagerly=True,
    )
    logs = tiny.history(distiller, *digits, batch_size=32, epochs=6)
    assert logs["accuracy"][-1] > 0.4  # by the teacher's classifier
    return distiller


def test_the_deployed_model_is_plain_and_predicts_the_same(trained, digits, tmp_path):
    model = trained.deploy()
    expected = trained.predict(digits[0][:16], verbose=0)
    np.testing.assert_allclose(
        model.predict(digits[0][:16], verbose=0), expected, rtol=1e-4, atol=1e-5
    )
    assert not {id(v) for v in model.variables} & {id(v) for v in trained.variables}
    path = tmp_path / "model.keras"
    model.save(path)
    plain = tiny.loaded_without_package(path)
    found = plain.predict(digits[0][:16], verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    trained.save(path)
    with pytest.raises(TypeError, match="keras_distill"):  # the check is one
        tiny.loaded_without_package(path)


def test_the_classifier_is_a_frozen_copy_of_the_teachers(trained, teacher):
    own = [v.numpy() for v in trained.classifier.variables[-2:]]
    np.testing.assert_array_equal(own[0], teacher.get_layer("logits").kernel.numpy())
    assert not trained.classifier.trainable_variables
    known = {id(v) for v in teacher.variables}
    assert not known & {id(v) for v in trained.variables}


def test_a_smaller_student_grid_pools_the_teachers(teacher, digits):
    distiller = kd.ReusedTeacherClassifier(
        nets.net(3), teacher, features=("relu3", "relu2")
    )
    # The rest of the teacher is convolutional: it takes the smaller grid.
    assert distiller.projector.target_shape == (2, 2, 12)
    distiller.compile("sgd", nets.SPARSE, run_eagerly=True)
    tiny.history(distiller, digits[0][:32], digits[1][:32])
    predicted = distiller.predict(digits[0][:4], verbose=0)
    deployed = distiller.deploy().predict(digits[0][:4], verbose=0)
    np.testing.assert_allclose(deployed, predicted, rtol=1e-4, atol=1e-5)


def test_a_classifier_of_another_grid_is_refused(teacher):
    other = keras.Sequential(
        [
            keras.Input((4, 4, 7)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )
    with pytest.raises(ValueError, match="incompatible"):
        kd.ReusedTeacherClassifier(
            nets.net(3), teacher, features=("relu3", "relu3"), classifier=other
        )


def test_a_classifier_that_cannot_be_cut_out_is_asked_for(teacher):
    with pytest.raises(TypeError, match="Give `classifier=`"):
        kd.ReusedTeacherClassifier(
            nets.net(3), [teacher, teacher], features=("relu3", "0/relu3")
        )


def test_a_given_classifier_is_left_alone(teacher):
    given = keras.Sequential(
        [
            keras.Input((2, 2, 18)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )
    distiller = kd.ReusedTeacherClassifier(
        nets.net(3), teacher, features=("relu3", "relu3"), classifier=given
    )
    assert given.trainable_variables
    assert not distiller.classifier.trainable_variables
    x = np.ones((1, 2, 2, 18), "float32")
    np.testing.assert_array_equal(distiller.classifier(x), given(x))
