"""What judges samples: a classifier of real digits. Its features take the place of Inception's in FID."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import write_safetensors
from ..errors import CheckpointError
from ..rng import derive_seed, seeded
from ..schedule import learning_rate
from .digits import CLASSES, Digits, sample
from .models import SIZE

FEATURES = 64
STEPS, BATCH, LR = 1000, 128, 2e-3


class Classifier(nn.Module):
    """Pictures (N, 1, 32, 32) to features (N, 64), and features to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        dims = (1, 32, 64, FEATURES)
        layers: list[nn.Module] = []
        for dim, out in pairwise(dims):
            layers += [nn.Conv2d(dim, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * FEATURES, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Statistics(NamedTuple):
    """Mean (F,) and covariance (F, F) of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


class Judge:
    """Tells the class of pictures, and how far a set of them is from real ones.

    Args:
        classifier: trained.
        train, held_out: the digits. Distances are to pictures of the held-out ones, which neither the
            classifier nor any model learnt from: whoever copies its training set is as far as that is.
        count: pictures in a set.
    """

    def __init__(self, classifier: Classifier, train: Digits, held_out: Digits, count: int) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        device = held_out.labels.device

        def real(digits: Digits, name: str) -> tuple[Tensor, Tensor]:
            seed = derive_seed("judge", name)
            return sample(digits, count, SIZE, torch.Generator(device).manual_seed(seed))

        pictures, labels = real(held_out, "reference")
        self.reference = self.statistics(pictures)
        self.accuracy = self.right(pictures, labels)
        """Of the classifier on held-out digits."""
        self.floor = self.distance(real(train, "floor")[0])
        """Distance of the training digits."""
        noise = torch.Generator(device).manual_seed(derive_seed("judge", "noise"))
        self.noise = self.distance(torch.randn(pictures.shape, device=device, generator=noise).clamp(-1, 1))
        """Distance of noise."""

    def features(self, pictures: Tensor) -> Tensor:
        """(N, 1, s * 32, s * 32) to (N, 64); larger pictures are averaged down to 32 x 32."""
        with torch.no_grad():
            return self.classifier(F.adaptive_avg_pool2d(pictures.float(), SIZE))

    def statistics(self, pictures: Tensor) -> Statistics:
        """Of the features of pictures."""
        features = self.features(pictures).double().cpu()
        return Statistics(features.mean(0), torch.cov(features.T))

    def distance(self, pictures: Tensor) -> float:
        """Frechet distance of the features to those of held-out digits."""
        return frechet(self.statistics(pictures), self.reference)

    def right(self, pictures: Tensor, labels: Tensor) -> float:
        """Share of pictures that are taken for what they should be."""
        with torch.no_grad():
            told = self.classifier.head(self.features(pictures)).argmax(1)
        return (told == labels).double().mean().item()

    def about(self) -> dict[str, object]:
        """For a result: what its distances mean, and which classifier they are from."""
        state = self.classifier.state_dict()
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(state):
            digest.update(state[name].cpu().numpy().tobytes())
        numbers = {"accuracy": self.accuracy, "floor": self.floor, "noise": self.noise}
        return {"digest": digest.hexdigest(), **numbers}


def frechet(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + trace(a + b - 2 (a b)^(1/2)) of two normal distributions (arXiv 1706.08500)."""
    # trace (a b)^(1/2) is the sum of the roots of the eigenvalues of the symmetric a^(1/2) b a^(1/2).
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root)
    traces = a.covariance.trace() + b.covariance.trace() - 2 * product.clamp_min(0).sqrt().sum()
    return ((a.mean - b.mean).square().sum() + traces).clamp_min(0).item()


def load_judge(path: Path, train: Digits, held_out: Digits, count: int, steps: int = STEPS) -> Judge:
    """The judge in a file; where there is none, it is trained and written.

    Raises:
        CheckpointError: the file is none of these, or was trained for other steps.
    """
    from safetensors import SafetensorError, safe_open

    classifier = Classifier()
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                told = json.loads(file.metadata()["judge"])
                classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged, remove it: {error!r}") from error
        if told != {"steps": steps}:
            raise CheckpointError(f"{path}: trained for {told['steps']} steps, expected {steps}")
        classifier.to(train.labels.device)
    else:
        classifier = _train(train, steps)
        write_safetensors(path, classifier.state_dict(), {"judge": json.dumps({"steps": steps})})
    return Judge(classifier, train, held_out, count)


def _train(digits: Digits, steps: int) -> Classifier:
    device = digits.labels.device
    with seeded(derive_seed("judge", "weights")):
        classifier = Classifier()
    classifier.to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), LR)
    for step in range(steps):
        generator = torch.Generator(device).manual_seed(derive_seed("judge", "step", step))
        pictures, labels = sample(digits, BATCH, SIZE, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, steps // 20, LR, 0.01 * LR)
        optimizer.zero_grad()
        F.cross_entropy(classifier.head(classifier(pictures)), labels).backward()
        optimizer.step()
    return classifier
