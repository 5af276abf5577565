"""Examples that a model treats alike: clusters of vectors by their directions (Marks et al. 2024, app. G.3).

``spectral`` clusters all pairs' angular similarity 1 - arccos(cos) / pi and is meant for up to about 8,192 vectors;
``kmeans`` works on unit vectors in small batches and scales to 100,000. Vectors are rows, dense or in SciPy's CSR form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from unweave.core.errors import UnweaveError

Method = Literal["spectral", "kmeans"]
Vectors = Any
"""float [N, D]: a NumPy array or a SciPy CSR array."""

_SPECTRAL_MOST = 20_000
"""rows beyond which the pairs alone take gigabytes"""
_CONTROLS = 20


@dataclass(frozen=True)
class Clusters:
    """Clusters 0 to K-1, the best first. Coherence is the mean cosine between a cluster's vectors and their mean.

    ``control`` is what coherence is for equally many vectors drawn at random, and ``spread`` its standard deviation
    over draws: small clusters are coherent by themselves, so only the excess says something.
    """

    labels: np.ndarray
    """int64 [N]: each vector's cluster; -1 for vectors without a direction (all zero)"""
    sizes: np.ndarray
    coherence: np.ndarray
    control: np.ndarray
    spread: np.ndarray
    stability: float | None
    """adjusted Rand index with the clusters that another seed finds: 1 the same, 0 no more alike than chance"""

    def __len__(self) -> int:
        return len(self.sizes)

    def members(self, cluster: int) -> np.ndarray:
        """The rows of one cluster, int64."""
        return np.flatnonzero(self.labels == cluster)


def cluster(
    vectors: Vectors,
    n_clusters: int,
    *,
    method: Method = "spectral",
    rank: Literal["coherence", "size"] = "coherence",
    seed: int = 0,
    stability: bool = True,
) -> Clusters:
    """Clusters of rows, ranked by how much more coherent they are than by chance, or by size.

    Raises UnweaveError for more clusters than vectors with a direction, NaN, and too many vectors for ``spectral``.
    """
    from sklearn.metrics import adjusted_rand_score

    units, places = unit_rows(vectors)
    n = len(places)
    if not 1 <= n_clusters <= n:
        raise UnweaveError(
            f"{n_clusters} clusters of {n} contexts cannot be made"
            + (f" ({vectors.shape[0] - n} have a vector of zeros)" if n < vectors.shape[0] else ""),
            where="clusters",
            remedy="ask for fewer clusters, or find more contexts: more tokens, a larger max_loss",
        )
    if method == "spectral" and n > _SPECTRAL_MOST:
        what = f"spectral clustering compares all pairs, and {n:,} contexts have too many"
        raise UnweaveError(what, where="method", remedy=f"use kmeans, or at most {_SPECTRAL_MOST:,} contexts")
    find = _finder(units, n_clusters, method)
    labels = find(seed).astype(np.int64)
    agree = float(adjusted_rand_score(labels, find(seed + 1))) if stability and n_clusters > 1 else None
    return _ranked(units, places, vectors.shape[0], labels, rank, seed, agree)


def angular_similarity(vectors: Vectors) -> np.ndarray:
    """1 - arccos(cos) / pi of all pairs of rows, float64 [N, N]: 1 for the same direction, 0 for the opposite one.

    Rows without a direction are at a right angle to all others. The diagonal is 1.
    """
    units = _normalised(vectors)
    cosines = units @ units.T
    cosines = np.asarray(cosines.todense() if sp.issparse(cosines) else cosines, dtype=np.float64)
    similar = 1 - np.arccos(np.clip(cosines, -1.0, 1.0)) / np.pi
    np.fill_diagonal(similar, 1.0)  # the arccosine magnifies rounding near 1
    return similar


def unit_rows(vectors: Vectors) -> tuple[Vectors, np.ndarray]:
    """The rows that are not zero, each of length 1, and which they are. UnweaveError for NaN or infinity."""
    values = vectors.data if sp.issparse(vectors) else np.asarray(vectors)
    if not np.isfinite(values).all():
        raise UnweaveError("vectors to cluster hold NaN or infinity", remedy="load the model in float32")
    places = np.unique(vectors.nonzero()[0])
    return _normalised(vectors[places]), places


def _normalised(vectors: Vectors) -> Vectors:
    from sklearn.preprocessing import normalize

    return normalize(vectors)  # rows of zeros stay


def _finder(units: Vectors, n_clusters: int, method: Method) -> Callable[[int], np.ndarray]:
    """Clusters of the same vectors by seed; the pairs' similarities are made once."""
    from sklearn.cluster import MiniBatchKMeans, SpectralClustering

    n = units.shape[0]
    if n_clusters in (1, n):  # nothing to find out, and scikit-learn's solvers refuse
        return lambda _seed: np.arange(n) if n_clusters == n else np.zeros(n, np.int64)
    if method == "spectral":
        affinity = angular_similarity(units)
        how: dict[str, Any] = {"affinity": "precomputed", "assign_labels": "kmeans"}
        return lambda seed: SpectralClustering(n_clusters, **how, random_state=seed).fit_predict(affinity)
    how = {"batch_size": max(1024, 2 * n_clusters), "n_init": "auto"}
    return lambda seed: MiniBatchKMeans(n_clusters, **how, random_state=seed).fit_predict(units)


def coherence(units: Vectors) -> float:
    """The mean cosine between unit vectors and their mean: the length of their mean."""
    mean = np.asarray(units.mean(axis=0), dtype=np.float64).ravel()
    return float(np.linalg.norm(mean))


def typical(vectors: Vectors, members: np.ndarray) -> np.ndarray:
    """A cluster's rows, int64, those first whose direction is nearest to the cluster's mean direction."""
    units = _normalised(vectors[members])
    mean = np.asarray(units.mean(axis=0), dtype=np.float64).ravel()
    return members[np.argsort(-np.asarray(units @ mean).ravel(), kind="stable")]


def _ranked(
    units: Vectors, places: np.ndarray, n: int, raw: np.ndarray, rank: str, seed: int, agree: float | None
) -> Clusters:
    """Clusters renumbered, the best first; empty ones, which k-means can leave, are dropped."""
    rng = np.random.default_rng(seed)
    names = np.unique(raw)
    sizes = np.array([(raw == name).sum() for name in names])
    own = np.array([coherence(units[np.flatnonzero(raw == name)]) for name in names])
    chance: dict[int, tuple[float, float]] = {}
    for size in np.unique(sizes).tolist():
        draws = [coherence(units[rng.choice(len(raw), size, replace=False)]) for _ in range(_CONTROLS)]
        chance[size] = (float(np.mean(draws)), float(np.std(draws)))
    control, spread = (np.array([chance[int(size)][i] for size in sizes]) for i in (0, 1))
    # A single context is always wholly coherent: its excess says nothing, so such clusters come last.
    excess = np.where(sizes > 1, own - control, -np.inf)
    best = np.lexsort((names, -excess, -sizes)) if rank == "size" else np.lexsort((names, -sizes, -excess))
    place = {int(names[old]): new for new, old in enumerate(best)}
    labels = np.full(n, -1, dtype=np.int64)
    labels[places] = [place[int(name)] for name in raw]
    return Clusters(labels, sizes[best], own[best], control[best], spread[best], agree)
