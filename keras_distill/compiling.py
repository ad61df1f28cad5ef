"""`compile`: Keras's arguments, and further options of every distiller."""

from __future__ import annotations

from typing import Any

import keras

from keras_distill.valid_metrics import ValidMetrics


class Compiling:
    """Mixed into the distillers: how they are compiled, and how that is stored."""

    def compile(
        self: Any,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: Any = "auto",
        auto_scale_loss: bool = True,
        *,
        check_finite: bool = False,
        skip_nonfinite: bool = False,
        log_gradient_share: int = 0,
        gradient_policy: Any = None,
        across_replicas: bool = False,
    ) -> Any:
        """Prepares training, as `keras.Model.compile`, and returns the distiller.

        Args:
            optimizer: As in Keras.
            loss: As in Keras; without a loss there is no hard term.
            loss_weights: As in Keras.
            metrics: As in Keras.
            weighted_metrics: As in Keras.
            run_eagerly: As in Keras.
            steps_per_execution: As in Keras.
            jit_compile: As in Keras: with `"auto"` XLA is off on CPU-only machines.
            auto_scale_loss: Whether the loss is scaled when any layer that is trained
                computes in float16.
            check_finite: Whether NaN or infinity in the teacher's outputs is an error
                that names the batch.
            skip_nonfinite: Whether a batch whose gradients hold NaN or infinity changes
                nothing; the log `skipped` is the share of such batches.
            log_gradient_share: Every so many steps log each weighted term's share of
                the gradient norm over the student's weights; 0 for never.
            gradient_policy: Function `(main, transfer, variables, epoch) -> gradients`
                that combines the gradients of hard, soft and regularisation losses
                (main) with those of the links (transfer), such as `ClipToMain()`;
                for distillers with links.
            across_replicas: Whether losses that compare rows do so over the global
                batch instead of each replica's own.

        Returns:
            The distiller itself.

        Raises:
            ValueError: If an option does not fit the others or the strategy.
        """
        if log_gradient_share < 0:
            raise ValueError(
                "`log_gradient_share` must be a number of steps, 0 for never. "
                f"Received: {log_gradient_share}"
            )
        if gradient_policy is not None and not self.link_names:
            raise ValueError(
                "`gradient_policy` has no effect: it combines the gradients of links "
                "with the others, and this distiller has no links."
            )
        optimizer = keras.optimizers.get(optimizer)
        self._check_compile(optimizer, loss, jit_compile, check_finite, across_replicas)
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if auto_scale_loss and not scaled and computes_in_float16(self):
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        if skip_nonfinite and "skipped" not in self._logs:
            self._logs.add("skipped")
        self._options = {
            "check_finite": check_finite,
            "skip_nonfinite": skip_nonfinite,
            "log_gradient_share": log_gradient_share,
            "gradient_policy": gradient_policy,
            "across_replicas": across_replicas,
        }
        self._jit_compile_argument = jit_compile
        self._compiled_loss = loss
        self._compile_loss: Any = None
        self._compile_metrics: Any = None
        super().compile(  # type: ignore[misc]
            optimizer=optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            # XLA, which "auto" may mean, has no assertions.
            jit_compile=False if check_finite else jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        if metrics is not None or weighted_metrics is not None:
            names = getattr(self, "output_names", None)  # a Sequential has none
            self._compile_metrics = ValidMetrics(
                metrics, weighted_metrics, output_names=names
            )
        if log_gradient_share:
            for term in self._terms:
                if f"{term}_gradient_share" not in self._logs:
                    self._logs.add(f"{term}_gradient_share")
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        return self

    def get_compile_config(self: Any) -> dict[str, Any] | None:
        config = super().get_compile_config()  # type: ignore[misc]
        if not config:
            return config
        # Keras stores what "auto" meant here; it may mean something else elsewhere.
        config["jit_compile"] = self._jit_compile_argument
        return config | keras.saving.serialize_keras_object(dict(self._options))

    def compile_from_config(self: Any, config: dict[str, Any]) -> None:
        config = dict(keras.saving.deserialize_keras_object(config))
        if self.distribute_strategy.num_replicas_in_sync == 1:
            config["across_replicas"] = False  # saved where there were several
        self.compile(**config)


def computes_in_float16(layer: keras.Layer) -> bool:
    """Whether any layer inside computes in float16: gradients then need a scale."""
    layers = layer._flatten_layers(include_self=False)
    return any(inner.compute_dtype == "float16" for inner in layers)
