"""The small network that reads what an image shows, for regression and for recognition, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from unispect.errors import ConfigError, unknown_name

RULES = ("adam", "sgd")


@dataclass(frozen=True, slots=True)
class Schooling:
    """How a head is trained, on batches of images without replacement within a pass.

    rule     "sgd" with momentum as published, or "adam", for which the size of the errors does not matter
    anneal   let the rate fall to 0 as a cosine
    """

    steps: int
    images: int
    rule: str
    learning_rate: float
    momentum: float
    decay: float
    anneal: bool

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(unknown_name("rule", self.rule, RULES))
        for name, least in {"steps": 1, "images": 2}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if not self.learning_rate > 0 or not 0 <= self.momentum < 1 or not self.decay >= 0:
            raise ConfigError(
                f"learning_rate={self.learning_rate}, momentum={self.momentum}, decay={self.decay}: expected a rate "
                "above 0, a momentum from 0 to below 1 and no negative decay"
            )

    def optimizer(self, head: nn.Module) -> torch.optim.Optimizer:
        """The rule on all parameters of a head."""
        if self.rule == "sgd":
            return torch.optim.SGD(head.parameters(), self.learning_rate, self.momentum, weight_decay=self.decay)
        return torch.optim.Adam(head.parameters(), self.learning_rate, (self.momentum, 0.999), weight_decay=self.decay)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.learning_rate * ((1 + math.cos(math.pi * step / self.steps)) / 2 if self.anneal else 1)


class Head(nn.Module):
    """One convolution that keeps the channels, the mean over the places, two linear layers: (N, C, g, g) -> (N, out).

    Convolution, hidden width and dropout before the linear layers are the paper's (CADA, section 3.3); it does not say
    kernel, normalisation, activation and pooling.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int, out: int, kernel: int, hidden: int, dropout: float) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0 or hidden < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                f"kernel={kernel}, hidden={hidden}, dropout={dropout}: expected an odd kernel, a width of at least 1 and a "
                "dropout from 0 to below 1"
            )
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.look = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.BatchNorm2d(channels), nn.GELU()
        )
        self.say = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out)
        )

    def forward(self, views: Tensor) -> Tensor:
        said: Tensor = self.say(self.look((views - self.mean) / self.scale).mean((2, 3)))
        return said

    def settle(self, views: Tensor) -> None:
        """Channels in units of the images that it learns from."""
        channels = views.transpose(0, 1).flatten(1)
        self.mean.copy_(channels.mean(1)[:, None, None])
        self.scale.copy_(channels.std(1).clamp(min=1e-6)[:, None, None])


def school(head: Head, views: Tensor, loss: Callable[[Tensor, Tensor], Tensor], schooling: Schooling, seed: int) -> None:
    """Train in place on views (n, C, g, g). `loss` takes what the head says of a batch and the numbers of its images."""
    head.settle(views)
    optimizer = schooling.optimizer(head)
    size = min(schooling.images, len(views))
    per_pass = max(1, len(views) // size)
    head.train()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(schooling.steps):
            turn, place = divmod(step, per_pass)
            order = np.random.default_rng((seed, turn)).permutation(len(views))
            images = torch.from_numpy(order[place * size : (place + 1) * size])
            for group in optimizer.param_groups:
                group["lr"] = schooling.rate(step)
            optimizer.zero_grad()
            torch.autograd.backward(loss(head(views[images]), images))
            optimizer.step()
    head.eval()
