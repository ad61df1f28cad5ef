"""Golden vectors: inputs with the value and gradient of the official code.

`FORMULAS` says, method by method, how a golden file is met: by one loss class or by
a few lines around it. Everything here runs on any Keras backend, so that the same
table serves the tests on TensorFlow, their copy in a process with another backend,
and the table of errors in the documentation, which this writes:

    python tests/losses/golden.py --out docs/results/golden.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill import adapters, losses

COMMAND = "tests/losses/golden.py --out docs/results/golden.json"
FOLDER = pathlib.Path(__file__).parent.parent / "golden"

# Keras's mean on JAX takes the detour over float32, also for float64.
JAX = keras.backend.backend() == "jax"
# |value - reference| <= relative * |reference| + absolute; the gradient likewise by
# its norm. Where the reference is 0 up to rounding only `absolute` says anything.
TOLERANCES = {
    "float64": {"value": (1e-7, 1e-8 if JAX else 1e-10), "gradient": (1e-5, 1e-9)},
    "float32": {"value": (2e-4, 1e-6), "gradient": (2e-3, 1e-6)},
}
if keras.backend.backend() == "torch":
    # There Keras's maximum and divide_no_nan, and so its reduction, give float32.
    TOLERANCES["float64"] = TOLERANCES["float32"]
# Its value is the trace of the formula's 1e-8, which float32 cannot resolve.
ABSOLUTE_ONLY = {"dist__edge_identical": 1e-5}
# The reference's gradient is an artefact of dividing by 1e-12.
FINITE_GRADIENT_ONLY = {
    "rkd_angle__edge_duplicate_student_only",
    "sp__edge_zero_sample",
}


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden file.

    Attributes:
        name: The file's name without suffix, `method` or `method__case`.
        meta: What the file says about itself: method, hyperparameters, source, ...
        inputs: The formula's inputs by name, float32 or int32.
        loss: Reference value.
        gradients: Reference gradient for each differentiated input.
        arrays: Everything in the file, also intermediate values (`out_*`).
    """

    name: str
    meta: dict[str, Any]
    inputs: dict[str, np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]

    @property
    def method(self) -> str:
        return self.name.partition("__")[0]


@functools.cache
def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    outputs = ("loss", "grad_", "out_")
    return Golden(
        name=name,
        meta=meta,
        inputs={k: v for k, v in arrays.items() if not k.startswith(outputs)},
        loss=float(arrays["loss"]),
        gradients={k: arrays[f"grad_{k}"] for k in meta["gradients_wrt"]},
        arrays=arrays,
    )


def files(method: str) -> list[str]:
    """The method's main file and its edge cases."""
    edges = sorted(path.stem for path in FOLDER.glob(f"{method}__*.npz"))
    return [method, *edges]


# How each golden file is met: `formula(x, dtype, hyperparameters)` returns the scalar;
# `x` holds the file's inputs as tensors, floats in `dtype`.
Formula = Callable[[dict[str, Any], str, dict[str, Any]], Any]
FORMULAS: dict[str, Formula] = {}


def formula(*methods: str) -> Callable[[Formula], Formula]:
    """Enters a function in the table under the names of golden files."""

    def enter(function: Formula) -> Formula:
        FORMULAS.update(dict.fromkeys(methods, function))
        return function

    return enter


def concrete() -> contextlib.AbstractContextManager[Any]:
    """Where values are read while the formula is compiled (JAX)."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.ensure_compile_time_eval()
    return contextlib.nullcontext()


def cross_entropy(labels: Any, logits: Any) -> Any:
    log_p = ops.log_softmax(logits)
    return -ops.mean(ops.take_along_axis(log_p, ops.expand_dims(labels, -1), -1))


@formula("kd_kl_t2")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.SoftTarget(temperature=h["temperature"], dtype=dtype)
    return loss(x["teacher_logits"], x["student_logits"])


@formula("kd_hinton_combined")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.SoftTarget(temperature=h["temperature"], dtype=dtype)
    soft = loss(x["teacher_logits"], x["student_logits"])
    hard = cross_entropy(x["labels"], x["student_logits"])
    return h["alpha"] * soft + (1 - h["alpha"]) * hard


@formula("kd_ce_form", "kd_ce_form_t2")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.SoftTarget(
        temperature=h["temperature"],
        divergence="cross_entropy",
        scale_by_temperature=h["t_squared"],
        dtype=dtype,
    )
    soft = loss(x["teacher_logits"], x["student_logits"])
    hard = cross_entropy(x["labels"], x["student_logits"])
    return h["alpha"] * hard + h["beta"] * soft


@formula("ls_kd")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.SoftTarget(h["temperature"], standardize=True, dtype=dtype)
    return loss(x["teacher_logits"], x["student_logits"])


@formula("logit_mse")
def _(x: dict, dtype: str, h: dict) -> Any:
    return losses.LogitMSE(dtype=dtype)(x["teacher_logits"], x["student_logits"])


@formula("dkd")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.DecoupledKD(h["alpha"], h["beta"], h["temperature"], dtype=dtype)
    return loss([x["teacher_logits"], x["labels"]], x["student_logits"])


@formula("dist")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.DIST(h["beta"], h["gamma"], h["tau"], dtype=dtype)
    return loss(x["teacher_logits"], x["student_logits"])


@formula("mlld")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.MultiLevelLogit(h["temperatures"], dtype=dtype)
    return loss(x["teacher_logits"], x["student_logits"])


@formula("confidence_penalty")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.ConfidencePenalty(h["beta"], dtype=dtype)
    return loss(x["labels"], x["student_logits"])


@formula("tfkd_reg_paper")
def _(x: dict, dtype: str, h: dict) -> Any:
    virtual = losses.VirtualTeacher(h["correct_prob"], h["temperature"], dtype=dtype)
    soft = virtual(x["labels"], x["student_logits"])
    hard = cross_entropy(x["labels"], x["student_logits"])
    return (1 - h["alpha"]) * hard + h["alpha"] * soft


@formula("rkd_distance")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.RelationalDistance(dtype=dtype)
    return loss(x["teacher_embedding"], x["student_embedding"])


@formula("rkd_angle")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.RelationalAngle(dtype=dtype)
    return loss(x["teacher_embedding"], x["student_embedding"])


@formula("rkd")
def _(x: dict, dtype: str, h: dict) -> Any:
    distance = FORMULAS["rkd_distance"](x, dtype, h)
    angle = FORMULAS["rkd_angle"](x, dtype, h)
    return h["distance_weight"] * distance + h["angle_weight"] * angle


@formula("pkt")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.ProbabilisticTransfer(dtype=dtype)
    return loss(x["teacher_embedding"], x["student_embedding"])


@formula("sp")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.SimilarityPreserving(dtype=dtype)
    return loss(x["teacher_feature_0"], x["student_feature_0"])


@formula("cc_gaussian")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.CorrelationCongruence(h["gamma"], h["taylor_order"], dtype=dtype)
    return loss(x["teacher_embedding"], x["student_embedding"])


def layers(x: dict, name: str) -> list[Any]:
    """The inputs `name_0`, `name_1`, ..., from shallow to deep."""
    return [x[key] for key in sorted(x) if key.startswith(f"{name}_")]


def layerwise(loss: keras.losses.Loss, x: dict) -> list[Any]:
    """A loss's value at each layer."""
    pairs = zip(layers(x, "teacher_feature"), layers(x, "student_feature"), strict=True)
    return [loss(teacher, student) for teacher, student in pairs]


def pairwise(loss: keras.losses.Loss, x: dict) -> Any:
    """A flow loss, summed over pairs of consecutive layers."""
    teacher, student = layers(x, "teacher_feature"), layers(x, "student_feature")
    return sum(
        loss(teacher[i : i + 2], student[i : i + 2]) for i in range(len(teacher) - 1)
    )


def adapted(adapter: keras.Layer, x: dict, weights: list[Any]) -> Any:
    """What an adapter with the given weights makes of the student's features."""
    student, teacher = x["student_feature"], x["teacher_feature"]
    adapter.match(tuple(student.shape), tuple(teacher.shape))
    adapter.build(tuple(student.shape))
    state = [variable.value for variable in adapter.non_trainable_variables]
    return adapter.stateless_call(weights, state, student)[0]


@formula("fitnet_hint", "simkd")
def _(x: dict, dtype: str, h: dict) -> Any:
    return losses.Hint(dtype=dtype)(x["teacher_feature"], x["student_feature"])


@formula("fitnet_hint_paper")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.Hint(variant="paper", dtype=dtype)
    return loss(x["teacher_feature"], x["student_feature"])


@formula("fitnet_hint_conv1x1")
def _(x: dict, dtype: str, h: dict) -> Any:
    regressor = adapters.Regressor(use_bias=h["bias"], dtype=dtype)
    student = adapted(regressor, x, [x["student_kernel"]])
    return losses.Hint(dtype=dtype)(x["teacher_feature"], student)


@formula("at")
def _(x: dict, dtype: str, h: dict) -> Any:
    return sum(layerwise(losses.AttentionTransfer(h["p"], dtype=dtype), x))


@formula("at_paper")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.AttentionTransfer(h["p"], variant="paper", dtype=dtype)
    return sum(layerwise(loss, x))


@formula("ab")
def _(x: dict, dtype: str, h: dict) -> Any:
    values = layerwise(losses.ActivationBoundary(h["margin"], dtype=dtype), x)
    weights = h["layer_weights"]
    return h["scale"] * sum(w * v for w, v in zip(weights, values, strict=True))


@formula("ofd")
def _(x: dict, dtype: str, h: dict) -> Any:
    total = 0.0
    for i, weight in enumerate(h["layer_weights"]):
        # That these are what the teacher's layers give is tested with the adapters.
        margin = load("ofd").arrays[f"out_margin_{i}"]
        loss = losses.MarginReLU(margin, dtype=dtype)
        value = loss(x[f"teacher_feature_{i}"], x[f"student_feature_{i}"])
        total = total + weight * value / h["divisor"]
    return total


@formula("nst")
def _(x: dict, dtype: str, h: dict) -> Any:
    return sum(layerwise(losses.NeuronSelectivity(dtype=dtype), x))


@formula("vid")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.VariationalInformation(h["eps"], dtype=dtype)
    head = adapters.VariationalHead(
        hidden=h["mid_channels"], variance=h["init_pred_var"], dtype=dtype
    )
    kernels = layers(x, "student_kernel")
    student = adapted(head, x, [x["student_log_scale"], *kernels])
    return loss(x["teacher_feature"], student)


@formula("ft")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.FactorTransfer(h["p"], dtype=dtype)
    return loss(x["teacher_factor"], x["student_factor"])


@formula("ft_repdistiller")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.FactorTransfer(h["p2"], variant="repdistiller", dtype=dtype)
    return loss(x["teacher_factor"], x["student_factor"])


@formula("reviewkd_hcl")
def _(x: dict, dtype: str, h: dict) -> Any:
    loss = losses.HierarchicalContext(h["levels"], dtype=dtype)
    return loss(layers(x, "teacher_feature"), layers(x, "student_feature"))


@formula("mgd")
def _(x: dict, dtype: str, h: dict) -> Any:
    # The file's mask in place of a random one.
    generation = adapters.MaskedGeneration(rate=h["lambda_"], dtype=dtype)
    kernels, biases = layers(x, "student_kernel"), layers(x, "student_bias")
    weights = [kernels[0], biases[0], kernels[1], biases[1]]
    masked = {**x, "student_feature": x["student_feature"] * x["mask"]}
    student = adapted(generation, masked, weights)
    loss = losses.Hint(variant="paper", dtype=dtype)
    return 2 * h["alpha"] * loss(x["teacher_feature"], student)


@formula("fsp")
def _(x: dict, dtype: str, h: dict) -> Any:
    return pairwise(losses.FlowOfProcedure(dtype=dtype), x)


@formula("fsp_repdistiller")
def _(x: dict, dtype: str, h: dict) -> Any:
    return pairwise(losses.FlowOfProcedure(variant="repdistiller", dtype=dtype), x)


@formula("kdsvd")
def _(x: dict, dtype: str, h: dict) -> Any:
    return pairwise(losses.SingularValue(h["k"], h["rbf_denominator"], dtype=dtype), x)


def value_and_gradient(
    function: Callable[[dict[str, Any]], Any], arrays: dict[str, np.ndarray]
) -> tuple[float, dict[str, np.ndarray]]:
    """Value of `function(tensors)` and its gradient for every tensor, any backend."""
    backend = keras.backend.backend()
    tensors = {k: ops.convert_to_tensor(v, v.dtype.name) for k, v in arrays.items()}
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(tensors)
        gradients = tape.gradient(value, tensors)
    elif backend == "jax":
        import jax

        # One compilation instead of one for every operation.
        value, gradients = jax.jit(jax.value_and_grad(function))(tensors)
    else:
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        value = function(tensors)
        value.backward()
        gradients = {k: tensor.grad for k, tensor in tensors.items()}
        value = value.detach()
    return float(value), {
        k: np.zeros_like(arrays[k]) if g is None else ops.convert_to_numpy(g)
        for k, g in gradients.items()
    }


def evaluate(name: str, dtype: str) -> tuple[float, dict[str, np.ndarray]]:
    """What the losses make of a golden file's inputs: value and gradients."""
    golden = load(name)
    function, h = FORMULAS[golden.method], golden.meta["hyperparameters"]
    arrays, fixed = {}, {}
    for key, array in golden.inputs.items():
        if np.issubdtype(array.dtype, np.floating):
            array = array.astype(dtype)
        if key in golden.gradients:
            arrays[key] = array
        else:
            fixed[key] = ops.convert_to_tensor(array, array.dtype.name)
    return value_and_gradient(lambda t: function(fixed | t, dtype, h), arrays)


def measure(name: str, dtype: str) -> dict[str, Any]:
    """Distances from the reference, the reference's size, and whether they will do."""
    golden = load(name)
    value, gradients = evaluate(name, dtype)

    def norm(arrays: list[np.ndarray]) -> float:
        return math.sqrt(sum(float(np.sum(np.square(a, dtype="f8"))) for a in arrays))

    keys = list(golden.gradients)
    found = {
        "value": abs(value - golden.loss),
        "gradient": norm([gradients[k] - golden.gradients[k] for k in keys]),
    }
    size = {
        "value": abs(golden.loss),
        "gradient": norm([golden.gradients[k] for k in keys]),
    }
    ok = {}
    for what, (relative, absolute) in TOLERANCES[dtype].items():
        limit = relative * size[what] + absolute
        if dtype == "float32":
            limit = ABSOLUTE_ONLY.get(name, limit)
        ok[what] = found[what] <= limit
    compared = name not in FINITE_GRADIENT_ONLY
    if not compared:
        ok["gradient"] = bool(all(np.isfinite(g).all() for g in gradients.values()))
    return {"error": found, "reference": size, "ok": ok, "compared": compared}


def check(name: str, dtype: str) -> None:
    """Fails unless value and gradient are within the tolerances."""
    result = measure(name, dtype)
    assert all(result["ok"].values()), f"{name} in {dtype}: {result}"


def table(quick: bool = False) -> list[dict[str, Any]]:
    """Method by method: source, largest relative errors over all of its files.

    A reference below 1e-6 is 0 up to rounding (what cannot be compared relatively):
    it is in `ok`, but not in the relative error. A quick table leaves out float32.
    """
    rows = []
    for method in sorted(FORMULAS):
        names = files(method)
        row = {"method": method, "source": load(method).meta["source"]}
        row["files"] = len(names)
        row["ok"] = True
        for dtype in ("float64",) if quick else ("float64", "float32"):
            results = [measure(name, dtype) for name in names]
            for what in ("value", "gradient"):
                row[f"{what}_{dtype}"] = max(
                    (
                        r["error"][what] / r["reference"][what]
                        for r in results
                        if r["reference"][what] > 1e-6
                        and (what == "value" or r["compared"])
                    ),
                    default=0.0,
                )
            row["ok"] &= all(all(r["ok"].values()) for r in results)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures losses on golden vectors.")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="leave out float32")
    options = parser.parse_args()
    rows = table(options.quick)
    columns = [name for name in rows[0] if name.endswith(("float64", "float32"))]
    print(f"{'method':24}" + "".join(f"{c:>18}" for c in columns) + "  ok")
    for row in rows:
        errors = "".join(f"{row[c]:18.1e}" for c in columns)
        print(f"{row['method']:24}{errors}  {row['ok']}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "title": "Losses against their official implementations",
            "setting": {
                "backend": keras.backend.backend(),
                "columns": "largest relative error over all files of a method",
                "command": f"python {COMMAND}",
            },
            "methods": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
