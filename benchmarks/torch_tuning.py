"""Prompt and head tuning in PyTorch, twice: as the reference code does it, and as well as PyTorch can.

Both tune the clusters of the same batches that our lanes get, with SGD and momentum, on the loss of Eq. 6. The
reference mixes all clusters in a batch and takes the mean over it; with G clusters of equal batches its rate has to be
G times ours to make the same steps.

Shapes: G clusters, B images of each per step, H W C image, D feature, Y classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is tuned.

    Attributes:
        network: the frozen network, images [B, H, W, C] to features.
        images: uint8 [N, H, W, C]; labels: int64 [N]; both on the host.
        rows: int64 [steps, G, B], the images of each step.
        prototypes: float32 [G, D].
        classes: Y.
        width: of the border prompt, in pixels.
        rates: float [steps], the learning rate of prompts and heads.
        momentum: of SGD.
        device: cpu or cuda; dtype: of the network.
    """

    network: nn.Module
    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    prototypes: np.ndarray
    classes: int
    width: int
    rates: np.ndarray
    momentum: float
    device: str
    dtype: torch.dtype


class _Decoded(Dataset):
    """The images in the order in which they are wanted, normalised on the host one by one, as image loaders do."""

    def __init__(self, task: Task):
        self.images, self.labels, self.order = task.images, task.labels, task.rows.reshape(-1)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.order[index]
        image = torch.from_numpy(self.images[row]).permute(2, 0, 1).float().div(255)
        return (image - 0.5) / 0.5, int(self.labels[row])


class _PadPrompter(nn.Module):
    """A border of free pixels, added to one image [1, C, H, W]: four strips around a centre of zeros."""

    def __init__(self, size: int, width: int, channels: int):
        super().__init__()
        inner = size - 2 * width
        self.inner = inner
        self.up = nn.Parameter(torch.zeros(1, channels, width, size))
        self.down = nn.Parameter(torch.zeros(1, channels, width, size))
        self.left = nn.Parameter(torch.zeros(1, channels, inner, width))
        self.right = nn.Parameter(torch.zeros(1, channels, inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centre = torch.zeros(1, x.shape[1], self.inner, self.inner, device=x.device)
        middle = torch.cat([self.left, centre, self.right], dim=3)
        return x + torch.cat([self.up, middle, self.down], dim=2)


def reference(task: Task) -> Iterator[float]:
    """The reference algorithm: yields the loss of each step.

    Every step: features of the plain images, the nearest prototype of each, one prompt module and one head module for
    every image, a second pass, the mean loss, one SGD over all modules.
    """
    steps, clusters, batch = task.rows.shape
    size, channels = task.images.shape[1], task.images.shape[3]
    prompts = nn.ModuleList(_PadPrompter(size, task.width, channels) for _ in range(clusters)).to(task.device)
    heads = nn.ModuleList(nn.Linear(task.prototypes.shape[1], task.classes) for _ in range(clusters)).to(task.device)
    for head in heads:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    groups = [{"params": module.parameters(), "lr": 0.0} for module in [*prompts, *heads]]
    optimizer = torch.optim.SGD(groups, momentum=task.momentum)
    prototypes = torch.from_numpy(task.prototypes).to(task.device)
    loader = DataLoader(_Decoded(task), batch_size=clusters * batch)
    for step, (images, labels) in enumerate(loader):
        images, labels = images.to(task.device), labels.to(task.device)
        with torch.no_grad():
            plain = _features(task, images)
        nearest = torch.cdist(plain, prototypes).argmin(1).tolist()
        prompted = torch.cat([prompts[k](images[i : i + 1]) for i, k in enumerate(nearest)])
        features = _features(task, prompted)
        logits = torch.cat([heads[k](features[i : i + 1]) for i, k in enumerate(nearest)])
        loss = F.cross_entropy(logits, labels)
        for group in optimizer.param_groups:
            group["lr"] = float(task.rates[step]) * clusters
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def _features(task: Task, images: torch.Tensor) -> torch.Tensor:  # [n, C, H, W] -> [n, D]
    return task.network(images.permute(0, 2, 3, 1).contiguous().to(task.dtype)).float()


class Best:
    """The best we can write in PyTorch: clusters assigned once, images on the device, all prompts and heads stacked.

    One compiled function gives loss and gradients; the same object may run many times.
    """

    def __init__(self, task: Task, compiled: bool = True):
        self.task = task
        size, channels, device = task.images.shape[1], task.images.shape[3], task.device
        self.images, self.labels = (torch.from_numpy(array).to(device) for array in (task.images, task.labels))
        self.rows = torch.from_numpy(task.rows).to(device)
        border = torch.ones(size, size, 1, device=device)
        border[task.width : size - task.width, task.width : size - task.width] = 0
        self.border = border
        self.shapes: Sequence[tuple[int, ...]] = (
            (size, size, channels),
            (task.prototypes.shape[1], task.classes),
            (task.classes,),
        )
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(
        self, prompts: torch.Tensor, kernels: torch.Tensor, biases: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Sum over clusters of their mean loss: the gradient of each is that of its own mean."""
        images = self.images[rows].float().div(255).sub(0.5).div(0.5)  # [G, B, H, W, C]
        images = images + (prompts * self.border)[:, None]
        features = self.task.network(images.flatten(0, 1).to(self.task.dtype), cls_only=True).float()  # [G * B, D]
        logits = torch.baddbmm(biases[:, None], features.view(*rows.shape, -1), kernels)  # [G, B, Y]
        losses = F.cross_entropy(logits.flatten(0, 1), self.labels[rows].flatten(), reduction="none")
        return losses.view(rows.shape).mean(1).sum()

    def run(self) -> Iterator[torch.Tensor]:
        """Tunes from scratch: yields the mean over the clusters of each step's loss, still on the device."""
        clusters, device = self.task.rows.shape[1], self.task.device
        parts = [torch.zeros(clusters, *shape, device=device, requires_grad=True) for shape in self.shapes]
        momenta = [torch.zeros_like(part) for part in parts]
        for rows, rate in zip(self.rows, self.task.rates, strict=True):
            loss = self.loss(*parts, rows)
            grads = torch.autograd.grad(loss, parts)
            with torch.no_grad():
                torch._foreach_mul_(momenta, self.task.momentum)
                torch._foreach_add_(momenta, grads)
                torch._foreach_add_(parts, momenta, alpha=-float(rate))
            yield loss.detach() / clusters
