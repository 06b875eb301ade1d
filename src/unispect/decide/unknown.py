"""Whether an image shows a product that the model has never seen.

Its novelty is minus the highest log-likelihood of its pooled features under a Gaussian for each known product: a simple
unified framework for detecting out-of-distribution samples (Lee, Lee, Lee, Shin, 2018), https://arxiv.org/abs/1807.03888,
with a covariance of its own for every product, after Ledoit and Wolf. What counts as too novel is decided by calibration
images of known products, split-conformally as scores are (see decide.conformal).
"""

from __future__ import annotations

from torch import Tensor, nn

from unispect.nn.recognition import Recogniser
from unispect.types import Features


class Novelty(nn.Module):
    """How unlike every known product an image is. Defects are small beside what tells products apart, but they add to it.

    channels   C of each level
    """

    def __init__(self, channels: tuple[int, ...], products: int) -> None:
        super().__init__()
        self.known = Recogniser(channels, products)

    def update(self, features: Features, product: Tensor) -> None:
        """Take in a batch of good images: levels (N, C, h, w), products (N,)."""
        self.known.update(features, product)

    def finish(self) -> None:
        """End of the one pass."""
        self.known.finish()

    def forward(self, features: Features) -> Tensor:
        """L levels (N, C, h, w) -> (N,), nats up to a constant; higher is stranger."""
        novelty: Tensor = -self.known.likelihoods(features).amax(1)
        return novelty

    def add(self, other: Novelty) -> None:
        """The products of another, after one's own."""
        self.known.add(other.known)

    def remove(self, product: int) -> None:
        """Forget a product; later ones move up."""
        self.known.remove(product)
