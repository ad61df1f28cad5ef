"""The wide residual networks of `models.py`, and a distillation step, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Normalization, ReLU and a 3 x 3 convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same = inputs == channels and stride == 1
        shortcut = None if same else nn.Conv2d(inputs, channels, 1, stride, bias=False)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = functional.relu(self.norm1(x), inplace=True)
        y = functional.relu(self.norm2(self.conv1(before)), inplace=True)
        return self.conv2(y) + (self.shortcut(before) if self.shortcut else x)


class WideResNet(nn.Module):
    """WRN-depth-width: gives the logits and the outputs of the three stages."""

    def __init__(self, depth: int, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        stages, before = [], 16
        for stage in range(3):
            channels, blocks = 16 * 2**stage * width, []
            for block in range((depth - 4) // 6):
                stride = 2 if stage and not block else 1
                blocks.append(Block(before, channels, stride))
                before = channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.norm, self.head = nn.BatchNorm2d(before), nn.Linear(before, num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, features = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        x = functional.relu(self.norm(x)).mean((2, 3))
        return self.head(x), features


def distillation_step(
    depths: tuple[int, int],
    width: int,
    x: Any,
    y: Any,
    *,
    temperature: float,
    links: bool,
    channels_last: bool,
) -> Callable[[], float]:
    """One step of the usual loop: SGD with momentum on labels and soft targets.

    Args:
        depths: Of teacher and student.
        width: Of both.
        x: Images `(B, H, W, 3)`, an array.
        y: Labels `(B,)`.
        temperature: Of the soft targets.
        links: Whether the outputs of the stages are compared as well.
        channels_last: The layout in memory.

    Returns:
        A function that does a step and returns the loss.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    teacher, student = (
        WideResNet(depth, width).to(memory_format=layout) for depth in depths
    )
    teacher.eval()
    student.train()
    images = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    labels = torch.tensor(y)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)

    def step() -> float:
        with torch.no_grad():
            target, known = teacher(images)
        optimizer.zero_grad()
        logits, features = student(images)
        soft = functional.kl_div(
            functional.log_softmax(logits / temperature, 1),
            functional.log_softmax(target / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        loss = 0.1 * functional.cross_entropy(logits, labels)
        loss = loss + 0.9 * temperature**2 * soft
        if links:
            for own, other in zip(features, known, strict=True):
                loss = loss + functional.mse_loss(own, other)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
