"""The projector against its equations and the sizes of the official files."""

import math

import pytest
import torch
from torch import nn

from nanollava.error import Error
from nanollava.projector import make_projector, whiten


def test_linear_is_the_papers_equation():
    projector = make_projector("linear", C=3, D=2)
    projector.load_state_dict({"weight": torch.tensor([[1.0, 2, 3], [0, -1, 1]]), "bias": torch.tensor([0.5, 0])})
    found = projector(torch.tensor([[[1.0, 1, 1], [2, 0, -1]]]))  # (B, N, C) = (1, 2, 3)
    assert found.tolist() == [[[6.5, 0.0], [-0.5, -1.0]]]


def test_mlp_is_two_layers_with_the_exact_gelu_between():
    """x * Phi(x) with the error function, not CLIP's quick_gelu nor the tanh approximation."""
    projector = make_projector("mlp2x_gelu", C=1, D=2)
    first = {"0.weight": [[1.0], [-2.0]], "0.bias": [0.0, 1.0]}
    second = {"2.weight": [[1.0, 0.0], [1.0, 1.0]], "2.bias": [0.0, 3.0]}
    projector.load_state_dict({name: torch.tensor(value) for name, value in (first | second).items()})
    a, b = (x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in (1.5, -2.0))  # 1.5 and -2 * 1.5 + 1
    found = projector(torch.tensor([[[1.5]]]))
    torch.testing.assert_close(found, torch.tensor([[[a, a + b + 3]]]), rtol=1e-6, atol=1e-6)
    assert abs(a - 1.39979) < 1e-5  # quick_gelu gives 1.39166, tanh 1.39957


@pytest.mark.parametrize(
    ("kind", "names", "parameters"),
    [
        ("linear", ["weight", "bias"], 4_198_400),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"], 20_979_712),
    ],
)
def test_names_and_sizes_are_those_of_the_official_files(kind, names, parameters):
    """7B: files of 8,396,800 and 41,959,424 bytes, two for each number."""
    with torch.device("meta"):
        tensors = make_projector(kind, C=1024, D=4096).state_dict()
    assert list(tensors) == names and sum(t.numel() for t in tensors.values()) == parameters


@pytest.mark.parametrize("kind", ["identity", "mlp3x_gelu", "mlp2x_gelu ", ""])
def test_another_kind_is_an_error_that_names_it(kind):
    with pytest.raises(Error, match="linear or mlp2x_gelu") as caught:
        make_projector(kind, C=2, D=2)
    assert repr(kind) in str(caught.value)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_whitened_features_vary_alike_in_all_directions_around_nothing(kind):
    torch.manual_seed(0)
    features = torch.randn(5000, 6) * torch.tensor([10.0, 3, 1, 1, 0.3, 0.1])
    features = features @ nn.init.orthogonal_(torch.empty(6, 6)) + 5
    projector = make_projector(kind, C=6, D=6)
    whiten(projector, features, smallest=1e-9)
    first = projector if kind == "linear" else projector[0]
    with torch.no_grad():
        found = first(features)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.cov(found.T), torch.eye(6), rtol=0, atol=1e-2)


@pytest.mark.parametrize("features", [torch.ones(50, 3), torch.randn(1, 3)], ids=["all alike", "one"])
def test_features_that_do_not_vary_cannot_be_whitened(features):
    with pytest.raises(Error, match="do not vary"):
        whiten(make_projector("linear", C=3, D=3), features)


def test_directions_without_variance_stay_quiet():
    torch.manual_seed(0)
    projector = make_projector("linear", C=3, D=3)
    whiten(projector, torch.randn(1000, 3) * torch.tensor([1.0, 1.0, 0.0]))
    nothing = projector.weight[:, 2].detach()
    assert nothing.norm() == pytest.approx(10, rel=0.1)  # 1 / sqrt(1e-2) of the largest variance, and no more
