"""TensorBoard: what a distiller is learning, beyond its logs."""

from keras_distill.monitoring.board import DistillationBoard
from keras_distill.monitoring.calibration import Calibration, calibration

__all__ = ["Calibration", "DistillationBoard", "calibration"]
