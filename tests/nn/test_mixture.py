"""The mixture of HGAD against loops written out, autograd and integrals that are one."""

import math

import pytest
import torch
from torch import Tensor

from unispect.nn.mixture import HierarchicalMixture, MixtureTerms, entropy, smoothed, spread_centres

EXACT = {"rtol": 0.0, "atol": 1e-12}
LEARNT = ("mu", "delta", "psi", "psi_intra")


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(cells: int, products: int = 4, channels: int = 7, centres: int = 3) -> HierarchicalMixture:
    """A mixture with random centres and weights and, where it has cells, metrics and offsets."""
    mixture = HierarchicalMixture(products, channels, centres, 1.0, cells, seed=3).double()
    with torch.no_grad():
        for seed, parameter in enumerate(mixture.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=10 + seed))
        mixture.offset.copy_(0.5 * draw(*mixture.offset.shape, seed=20))
        mixture.metric.copy_(0.3 * draw(*mixture.metric.shape, seed=21) + torch.eye(channels))
        if cells:
            mixture.log_volume.copy_(torch.linalg.slogdet(mixture.metric)[1])
    return mixture


def log_sum(values: list[float]) -> float:
    return math.log(sum(math.exp(value) for value in values))


class Literal:
    """Section 3 of the paper and its code, one vector at a time and without tricks."""

    def __init__(self, mixture: HierarchicalMixture) -> None:
        self.own = mixture
        self.weights = mixture.psi.detach().softmax(0).log().tolist()
        self.inner = mixture.psi_intra.detach().softmax(1).log()

    def residual(self, z: Tensor, y: int, cell: int) -> tuple[Tensor, float]:
        if not self.own.cells:
            return z - self.own.mu[y].detach(), 0.0
        metric = self.own.metric[y, cell]
        return metric @ (z - self.own.mu[y].detach() - self.own.offset[y, cell]), float(metric.det().abs().log())

    def main(self, z: Tensor, cell: int) -> list[float]:
        """log N(z; mu_y) without its constant, for each product."""
        found = [self.residual(z, y, cell) for y in range(self.own.products)]
        return [volume - float(residual @ residual) / 2 for residual, volume in found]

    def inside(self, z: Tensor, y: int, cell: int) -> float:
        residual, volume = self.residual(z, y, cell)
        terms = []
        for i in range(self.inner.shape[1]):
            gap = residual if i == 0 else residual - self.own.delta[y, i - 1].detach()
            terms.append(float(self.inner[y, i]) - float(gap @ gap) / 2)
        return log_sum(terms) + volume

    def losses(self, z: Tensor, logdet: float, y: int, cell: int, smoothing: float) -> list[float]:
        """L_g, L_mi, L_e, L_in and L_z of one vector."""
        main, size, products = self.main(z, cell), len(z), self.own.products
        joint = [a + b for a, b in zip(main, self.weights, strict=True)]
        target = [smoothing / products + (1 - smoothing) * (k == y) for k in range(products)]
        certain = [a - log_sum(joint) - b for a, b in zip(joint, self.weights, strict=True)]
        posterior = [math.exp(a - log_sum(main)) for a in main]
        within = self.inside(z, y, cell) + logdet
        return [
            -(log_sum(joint) + logdet) / size,
            -sum(t * c for t, c in zip(target, certain, strict=True)),
            -sum(p * math.log(p) for p in posterior),
            -within / size,
            math.log1p(math.exp(-(within - size / 2 * math.log(2 * math.pi)) / size)),
        ]


def as_list(terms: MixtureTerms) -> list[Tensor]:
    return [terms.inter, terms.information, terms.entropy, terms.intra, terms.sigmoid]


@pytest.mark.parametrize("smoothing", [0.0, 0.02])
@pytest.mark.parametrize("cells", [0, 2])
def test_losses_are_those_of_the_loops(cells: int, smoothing: float) -> None:
    mixture, (m, c, q) = stirred(cells), (5, max(cells, 2), 3)
    z, logdet, product = draw(m, c, q, 7), draw(m, c, q, seed=2), torch.tensor([2, 0, 2, 3, 1])
    literal = Literal(mixture)
    rows = [
        literal.losses(z[i, j, k], float(logdet[i, j, k]), int(product[i]), j, smoothing)
        for i in range(m)
        for j in range(c)
        for k in range(q)
    ]
    found = torch.stack(as_list(mixture.terms(z, logdet, product, smoothing))).detach()
    torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64).mean(0), **EXACT)


@pytest.mark.parametrize("cells", [0, 2])
def test_densities_vector_by_vector(cells: int) -> None:
    mixture, z = stirred(cells), draw(3, 2, 2, 7)
    literal, product = Literal(mixture), torch.tensor([3, 0, 3])
    with torch.no_grad():
        logits, own = mixture.logits(z), mixture.own(z, product)
    for i, j, k in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2)).tolist():
        expected = torch.tensor(literal.main(z[i, j, k], j), dtype=torch.float64)
        torch.testing.assert_close(logits[:, i, j, k], expected, **EXACT)
        assert float(own[i, j, k]) == pytest.approx(literal.inside(z[i, j, k], int(product[i]), j), abs=1e-12)


@pytest.mark.parametrize("cells", [0, 2])
def test_each_loss_teaches_only_what_it_should(cells: int) -> None:
    mixture, z = stirred(cells), draw(4, 2, 3, 7).requires_grad_()
    product, logdet = torch.tensor([0, 1, 2, 3]), draw(4, 2, 3, seed=2)
    taught = {
        "inter": {"mu", "psi"},
        "information": {"mu"},
        "entropy": {"mu"},
        "intra": {"delta", "psi_intra"},
        "sigmoid": {"delta", "psi_intra"},
    }
    terms = mixture.terms(z, logdet, product, 0.02)
    for name, expected in taught.items():
        wanted = [z, *(getattr(mixture, each) for each in LEARNT)]
        gradients = torch.autograd.grad(getattr(terms, name), wanted, retain_graph=True, allow_unused=True)
        moved = {
            each for each, gradient in zip(("z", *LEARNT), gradients, strict=True) if gradient is not None and gradient.any()
        }
        assert moved == expected | {"z"}, name


def test_gradients_are_those_of_finite_differences() -> None:
    mixture, z, logdet = stirred(2), draw(4, 2, 3, 7), draw(4, 2, 3, seed=2)
    product = torch.tensor([0, 1, 2, 3])
    for position, name in ((0, "psi"), (0, "mu"), (1, "mu"), (2, "mu"), (3, "delta"), (4, "psi_intra")):
        parameter = getattr(mixture, name)
        gradient = torch.autograd.grad(as_list(mixture.terms(z, logdet, product, 0.02))[position], parameter)[0]
        direction, step = draw(*parameter.shape, seed=9), 1e-5
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):  # forward, back over both steps, and home
                parameter += sign * step * direction
                values.append(float(as_list(mixture.terms(z, logdet, product, 0.02))[position]))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((gradient * direction).sum()), abs=1e-8)


@pytest.mark.parametrize("cells", [0, 3])
def test_densities_integrate_to_one(cells: int) -> None:
    mixture, axis = stirred(cells, products=2, channels=2), torch.linspace(-25, 25, 500, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)[:, None, None, :].expand(-1, max(cells, 1), 1, 2)
    area = float(axis[1] - axis[0]) ** 2 / (2 * math.pi)
    with torch.no_grad():
        inside = torch.stack([mixture.inside(z, y) for y in range(2)]).exp().sum((1, 3)) * area
        main = mixture.logits(z).exp().sum((1, 3)) * area
    torch.testing.assert_close(inside, torch.ones_like(inside), rtol=0, atol=1e-3)
    torch.testing.assert_close(main, torch.ones_like(main), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("products", "distance"), [(15, 5.0), (10, 5.0), (40, 5.0), (12, 4.9237), (3, 4.9812), (200, 5.0), (1, math.nan)]
)
def test_first_centres_are_as_far_apart_as_published(products: int, distance: float) -> None:
    centres = spread_centres(products, 200, torch.Generator().manual_seed(0)).double()
    found = torch.pdist(centres)
    assert centres.shape == (products, 200)
    torch.testing.assert_close(found, torch.full_like(found, distance), rtol=0, atol=6e-5)


def test_more_products_than_channels() -> None:
    centres = spread_centres(500, 20, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centres.norm(dim=1), torch.full((500,), 5 / math.sqrt(2)))
    assert torch.pdist(centres).min() > 0.5
    assert float(torch.pdist(centres).mean()) == pytest.approx(5, abs=0.2)


def near(mixture: HierarchicalMixture, product: int) -> Tensor:
    """Vectors drawn from the main Gaussian of a product, as a well-trained flow would give them, (8, 1, 250, D)."""
    return mixture.mu[product].detach() + draw(8, 1, 250, mixture.channels)


@pytest.mark.parametrize(("scale", "alive"), [(1.0, False), (0.1, True)])
def test_centres_inside_a_product_learn_only_from_a_close_start(scale: float, alive: bool) -> None:
    mixture = HierarchicalMixture(15, 200, 10, scale).double()
    product = torch.full((8,), 4)
    mixture.terms(near(mixture, 4), torch.zeros(8, 1, 250).double(), product, 0.02).intra.backward()
    assert mixture.delta.grad is not None
    largest = float(mixture.delta.grad.abs().max())
    assert largest > 1e-5 if alive else largest < 1e-10


@pytest.mark.parametrize(("scale", "least", "most"), [(1.0, 0.0, 1e-8), (0.1, 0.02, 0.3)])
def test_responsibilities_are_spread_only_from_a_close_start(scale: float, least: float, most: float) -> None:
    mixture = HierarchicalMixture(15, 200, 10, scale).double()
    with torch.no_grad():
        shares = mixture.responsibilities(near(mixture, 4), 4).flatten(0, 2)
    torch.testing.assert_close(shares.sum(1), torch.ones(2000, dtype=torch.float64), **EXACT)
    assert ((shares.mean(0)[1:] >= least) & (shares.mean(0)[1:] <= most)).all()


def test_responsibilities_are_the_shares_of_the_density() -> None:
    mixture, z = stirred(2), draw(3, 2, 2, 7)
    direct = torch.autograd.grad(mixture.inside(z, 1).sum(), mixture.psi_intra)[0][1]
    # d logsumexp(a + log_softmax(psi)) / d psi_i is the responsibility less the weight, summed over the vectors.
    shares = (mixture.responsibilities(z, 1) - mixture.psi_intra[1].softmax(0)).sum((0, 1, 2)).detach()
    torch.testing.assert_close(direct, shares, **EXACT)


def test_entropy() -> None:
    torch.testing.assert_close(entropy(torch.zeros(4, 3)), torch.full((3,), math.log(4)))
    assert entropy(torch.tensor([[0.0], [-1000.0]])).item() == 0
    logits = draw(5, 6)
    expected = torch.distributions.Categorical(logits=logits.T).entropy()
    torch.testing.assert_close(entropy(logits), expected, **EXACT)


def test_smoothed_targets() -> None:
    found = smoothed(torch.tensor([1, 0]), 4, 0.02)
    expected = torch.tensor([[0.005, 0.985, 0.005, 0.005], [0.985, 0.005, 0.005, 0.005]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, **EXACT)
