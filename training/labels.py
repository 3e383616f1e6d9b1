"""The labels of a run: its last clustering, in memory, in its files, in its log.

labels.take(epoch, found, net=net, to_points=...)      # clusters, assignments.csv, clustering.pth.tar
F.cross_entropy(net(x), labels.of(index))              # the cluster ids of these images
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoint
import distributed
from algorithms.agreement import compare
from clustering import Assignment
from data import ImageList
from features import ToPoints
from models.network import Network
from models.weights import body_state
from training.logs import ClusterLog, flags_of, take_over, write_assignments
from util import Log


class PseudoLabels:
    """A part of a run (Run.keep): the cluster ids that its images have been given last.

    epoch: for which epoch that was, -1 before the first one; assignments: one for each head, mostly one.
    """

    def __init__(
        self, exp: Path, images: ImageList, log: Log, settings: dict[str, Any], origin: Path | None = None
    ) -> None:
        """settings: of the run, for those who assign other images by clustering.pth.tar; origin: the folder
        of the run that goes on in exp, where it is another one."""
        self.exp, self.images, self.log, self.settings = exp, images, log, settings
        self.origin = origin or exp
        self.epoch = -1
        self.assignments: list[Assignment] = []
        self._figures: dict[str, Any] = {}
        self._clusters: ClusterLog | None = None
        self._tensors: list[torch.Tensor] = []

    @property
    def ids(self) -> np.ndarray:
        """(N,) int64, of the first head."""
        return self.assignments[0].labels

    @property
    def num_clusters(self) -> int:
        return self.assignments[0].num_clusters

    @property
    def log_k(self) -> float:
        """The cross-entropy of guessing among the clusters."""
        return math.log(max(self.num_clusters, 2))

    def of(self, index: torch.Tensor, device: torch.device | str = "cpu", head: int = 0) -> torch.Tensor:
        """The ids (B,) int64 of the images index (B,), on a device."""
        return self._tensors[head][index].to(device, non_blocking=True)

    def figures(self) -> dict[str, Any]:
        """What the log line of an epoch with these labels says."""
        return dict(self._figures)

    # -- a new clustering

    def set(self, epoch: int, *found: Assignment) -> None:
        """These are the labels from `epoch` on."""
        before = self.assignments
        self.epoch, self.assignments = epoch, list(found)
        self._tensors = [torch.from_numpy(a.labels) for a in found]
        self._figures = self._describe(before)

    def take(self, epoch: int, *found: Assignment, net: Network, layer: str, to_points: ToPoints) -> None:
        """These are the labels from `epoch` on; writes them, and what assigning other images takes.

        net: as it was clustered: the training that follows changes it. layer, to_points: what of it was.
        """
        self.set(epoch, *found)
        if distributed.is_main():
            if self._clusters is None:
                self._clusters = ClusterLog(self.exp / "clusters")
            self._clusters.append(found[0].lists())
            self._write_csv()
            self._write_clustering(net, layer, to_points)
        self._tell()

    def _describe(self, before: list[Assignment]) -> dict[str, Any]:
        """Figures of the first head: loss, sizes, agreement with the last clustering and with the classes."""
        now = self.assignments[0]
        figures: dict[str, Any] = {
            "clustering_loss": now.objective,
            "pca_dims": now.centroids.shape[1],
            "clusters": now.describe_sizes(),
        }
        others = {
            "previous": before[0].labels if before else None,  # the paper's figure 2b
            "classes": self.images.classes,  # figure 2a
        }
        for what, labels in others.items():
            if labels is not None:
                scores = compare(now.labels, labels)
                figures |= {f"{name}_{what}": value for name, value in scores.items()}
        return figures

    def _tell(self) -> None:
        """A line on the clustering, and a warning when it collapses."""
        figures, sizes = self._figures, self._figures["clusters"]
        nmi = "".join(
            f"  NMI to {name} {figures[f'nmi_{what}']:.3f} (AMI {figures[f'ami_{what}']:.3f})"
            for what, name in (("previous", "last epoch"), ("classes", "classes"))
            if f"nmi_{what}" in figures
        )
        self.log(
            f"epoch {self.epoch} clustering loss {figures['clustering_loss']:.6g}  {sizes['nonempty']} of "
            f"{self.num_clusters} clusters filled, sizes {sizes['min']} to {sizes['max']}{nmi}"
        )
        if sizes["nonempty"] > len(self.ids) / 2:
            self.log(
                f"warning: {sizes['nonempty']} clusters of {len(self.ids)} images: most hold one or two; "
                "try fewer clusters, or give more images"
            )
        if sizes["max"] > len(self.ids) / 2:
            rate, k = flags_of(self.settings)
            self.log(
                f"warning: collapse, the largest cluster holds {sizes['max']} of {len(self.ids)} images; "
                f"try a lower {rate}, another {k}, or colour instead of --sobel"
            )

    # -- files

    def _write_csv(self) -> None:
        heads = [(a.labels, a.distances) for a in self.assignments]
        write_assignments(self.exp / "assignments.csv", list(self.images.paths), *heads)

    def _write_clustering(self, net: Network, layer: str, to_points: ToPoints) -> None:
        """EXP/clustering.pth.tar: PCA and centroids fit the weights of this moment alone."""
        now = self.assignments[0]
        checkpoint.save(self.exp / checkpoint.CLUSTERING, {
            "epoch": self.epoch,
            "arch": net.arch,
            "state_dict": body_state(net),
            "layer": layer,
            "transform": to_points.state_dict(),
            "metric": "l2",
            "assignment": now.state_dict(),
            "points": None if now.points is None else torch.from_numpy(now.points),
            "paths": list(self.images.paths),
            "root": self.images.folder,
            "bits": self.images.bits,
            "args": self.settings,
        })  # fmt: skip

    # -- a part of the checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "assignments": [a.state_dict() for a in self.assignments],
            "clusters_size": self._clusters.size if self._clusters else 0,
            "figures": self._figures,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on: the files are brought to what the checkpoint had seen, also from the folder of its run."""
        self.epoch, self._figures = state["epoch"], dict(state["figures"])
        self.assignments = [Assignment.from_state_dict(a) for a in state["assignments"]]
        if any(len(a.labels) != len(self.images) for a in self.assignments):
            raise ValueError(f"labels of another number of images than {len(self.images)}")
        self._tensors = [torch.from_numpy(a.labels) for a in self.assignments]
        if state["clusters_size"]:
            distributed.on_main(self._restore_files, state["clusters_size"])

    def _restore_files(self, clusters_size: int) -> None:
        take_over("clusters", self.origin, self.exp)
        self._clusters = ClusterLog(self.exp / "clusters", clusters_size)
        self._write_csv()
