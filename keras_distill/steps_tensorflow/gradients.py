"""Gradients: what is differentiated, what a policy makes of it, who gets it."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_distill.distribute.replicas import first_replica, replica_count
from keras_distill.distribute.updates import (
    apply_gradients,
    clip_gradients,
    sum_gradients,
)
from keras_distill.heads import example_rows
from keras_distill.taps import children, reading, run_with_taps


class Verdict(NamedTuple):
    """What a batch may change: booleans, None for surely.

    Attributes:
        weights: Whether weights are updated.
        whole: The same without regard to what is not finite, to which a
            LossScaleOptimizer sees itself.
        statistics: Whether moving statistics move.
    """

    weights: Any
    whole: Any
    statistics: Any


class Gradients:
    """Mixed into the steps: from weighted losses to the optimizer."""

    def _tape(self: Any) -> tf.GradientTape:
        """A tape that records what is trained, and never a teacher."""
        several = (
            self._options["gradient_policy"] or self._options["log_gradient_share"]
        )
        return tf.GradientTape(bool(several), watch_accessed_variables=False)

    def _groups(self: Any, losses: dict[str, Any]) -> list[Any]:
        """What is differentiated: the total, or main and transfer for a policy."""
        if not self._options["gradient_policy"]:
            return [self.optimizer.scale_loss(tf.add_n(list(losses.values())))]
        links = self.link_names
        main = [loss for name, loss in losses.items() if name not in links]
        transfer = [loss for name, loss in losses.items() if name in links]
        return [
            self.optimizer.scale_loss(tf.add_n(group) if group else tf.zeros(()))
            for group in (main, transfer)
        ]

    @property
    def link_names(self: Any) -> tuple[str, ...]:
        """Terms that are transfer from links: see `gradient_policy`."""
        return ()

    @property
    def transfer_losses(self: Any) -> list[Any]:
        """The losses of the terms that a subclass declares, if they are Keras's."""
        return []

    @property
    def compares_rows(self: Any) -> bool:
        """Whether any loss compares the rows of a batch with each other."""
        return False

    def _apply(
        self: Any,
        groups: list[list[Any]],
        variables: list[Any],
        verdict: Verdict,
        optimizer: Any = None,
    ) -> None:
        optimizer = optimizer or self.optimizer
        policy = self._options["gradient_policy"]
        gradients = groups[0]
        if policy or replica_count() > 1:
            # Policies and clipping see gradients without the loss scale.
            scale = optimizer.scale_loss(tf.ones(()))
            groups = [
                [None if g is None else _divided(dense(g), scale) for g in group]
                for group in groups
            ]
            gradients = groups[0]
            if policy:
                gradients = self._combined(policy, *groups, variables)
            gradients = clip_gradients(optimizer, gradients)
            gradients = [
                None if g is None else g * tf.cast(scale, g.dtype) for g in gradients
            ]
        # It skips what is not finite itself, and lowers its scale.
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        ok = verdict.whole if scales else verdict.weights
        apply_gradients(optimizer, gradients, variables, ok)

    def _combined(
        self: Any,
        policy: Any,
        main: list[Any],
        transfer: list[Any],
        variables: list[Any],
    ) -> list[Any]:
        """The student's gradients by the policy, those of adapters added.

        The main task does not depend on an adapter: a policy that compares with it
        would hold the adapter where it is.
        """
        own = {id(v) for v in self.student.trainable_variables}
        mine = [i for i, v in enumerate(variables) if id(v) in own]
        combined = [
            t if m is None else m if t is None else m + t
            for m, t in zip(main, transfer, strict=True)
        ]
        chosen = policy(
            [main[i] for i in mine],
            [transfer[i] for i in mine],
            [variables[i] for i in mine],
            self._epoch.value,
        )
        for i, gradient in zip(mine, chosen, strict=True):
            combined[i] = gradient
        return combined

    def _log_gradient_shares(self: Any, tape: tf.GradientTape, losses: Any) -> None:
        every = self._options["log_gradient_share"]
        if not every:
            return
        names = [name for name in losses if name in self._terms]
        values = values_of(self.student.trainable_variables)
        scale = self.optimizer.scale_loss(tf.ones(()))  # float16 holds no small ones

        def shares() -> Any:
            norms = []
            for name in names:
                gradients = sum_gradients(tape.gradient(losses[name], values, scale))
                some = [
                    tf.cast(dense(g), tf.float32) for g in gradients if g is not None
                ]
                norms.append(tf.linalg.global_norm(some) if some else tf.zeros(()))
            return tf.math.divide_no_nan(tf.stack(norms), tf.add_n(norms))

        due = tf.equal(tf.cast(self.optimizer.iterations, tf.int64) % every, 0)
        if replica_count() > 1:
            found = shares()  # collectives cannot be inside a cond
        else:
            found = tf.cond(due, shares, lambda: tf.zeros(len(names)))
        # A scale that is still too large gives infinity; that batch changes nothing.
        known = tf.reduce_all(tf.math.is_finite(found))
        weight = tf.cast(due & known, tf.float32)
        for index, name in enumerate(names):
            share = tf.where(known, found[index], 0.0)
            self._logs.update(f"{name}_gradient_share", share, weight)

    def _reached_by(self: Any, paths: list[str]) -> set[int]:
        """Ids of the student's variables that the features at some layers depend on.

        Found by differentiating the features of some rows, which works for any model:
        trainable variables by their own gradient, others (statistics, states of random
        generators) by that of their layer's outputs.
        """
        layers = list(self.student._flatten_layers(include_self=False))
        trainable = self.student.trainable_variables
        x = example_rows(self._student_spec)
        with (
            keras.StatelessScope(),  # stateful layers must not remember these rows
            tf.GradientTape() as tape,
            reading(layers) as found,
        ):
            tape.watch([t for t in keras.tree.flatten(x) if t.dtype.is_floating])
            features = run_with_taps(self.student, x, paths, False)[1]
            outputs = [
                [
                    tensor
                    for tensor in keras.tree.flatten(found[id(layer)])
                    if tf.is_tensor(tensor) and tensor.dtype.is_floating
                ]
                for layer in layers
            ]
        by_variable, by_layer = tape.gradient(
            keras.tree.flatten(features),
            ([first_replica(v.value) for v in trainable], outputs),
        )
        reached = {
            id(v)
            for v, gradient in zip(trainable, by_variable, strict=True)
            if gradient is not None
        }
        for layer, gradients in zip(layers, by_layer, strict=True):
            if any(gradient is not None for gradient in gradients):
                inner = {id(v) for child in children(layer) for v in child.variables}
                reached |= {id(v) for v in layer.non_trainable_variables} - inner
        return reached


def _divided(gradient: Any, scale: Any) -> Any:
    return gradient / tf.cast(scale, gradient.dtype)


def values_of(variables: list[Any]) -> list[Any]:
    return [variable.value for variable in variables]


def dense(gradient: Any) -> Any:
    return tf.convert_to_tensor(gradient)
