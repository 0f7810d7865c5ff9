"""FID and KID of embeddings: how far two sets of pictures are apart, by torchmetrics."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class _Embedded(nn.Module):
    """Stands for the network of torchmetrics, which is given embeddings (B, D) in the place of pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, given: Tensor) -> Tensor:
        # Before 1.3 torchmetrics asked for the number of features by a picture.
        return given if given.ndim == 2 else torch.zeros(len(given), self.num_features)


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """FID: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of means and covariances (Heusel et al. 2017). (n, D), (m, D)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return float(_compared(FrechetInceptionDistance(feature=_Embedded(real.shape[1])), real, made))


def kernel_distance(real: Tensor, made: Tensor) -> float:
    """KID: the unbiased squared maximum mean discrepancy with a cubic kernel (Binkowski et al. 2018), a mean over 100
    random subsets of up to 1,000 of each, the same at every call. (n, D), (m, D), of two at least."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(real), len(made), 1000)
    subsets = 1 if len(real) == len(made) == size else 100
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        torch.manual_seed(0)
        metric = KernelInceptionDistance(feature=_Embedded(real.shape[1]), subsets=subsets, subset_size=size)
        return float(_compared(metric, real, made)[0])


def _compared(metric: Any, real: Tensor, made: Tensor) -> Any:
    """A metric of two sets that are whole on every process."""
    metric.sync_on_compute = False
    metric.update(real, real=True)
    metric.update(made, real=False)
    return metric.compute()
