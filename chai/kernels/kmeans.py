"""K-means of the heads' features on the GPU: one program clusters the heads of one layer and row.

The algorithm, its ties and its results are those of :mod:`chai.clustering.kmeans`: Ward's clustering, then exchanges of
single points. The matrices are in registers, ``[rows, points]``, a thread holding the rows of one point (with one warp;
with more, some of them): reductions over the rows stay within a thread, and only vectors of P numbers are reduced
across threads. All decisions are made on the device.

In ``while`` loops, the condition depends on variables that the body uses, too: Triton 3.6 and 3.7 fail to compile some
loops whose condition alone uses a variable.

What equals the CPU's numbers to the last bit: the distances, the inertia that each merge adds (so equal costs stay
equal), and the sums of the distances of each point to the members of each cluster. The sum over the members of a
cluster that makes its inertia has another order. It enters comparisons only where the costs are compared within the
relative difference ``TIE``, a trillion times its rounding error; and where distances are equal or zero in theory, as
those of equal points and of points on a grid, sums of fp32 numbers in fp64 are exact in any order.

Products and sums must not be contracted to fused multiply-adds, which round differently: ``enable_fp_fusion=False``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chai.kernels.compiler import Case, tl, triton

#: Costs within this relative difference are equal (as in :mod:`chai.clustering.kmeans`).
TIE = 1e-4
#: The most points of a problem: more do not fit the registers of a program.
MOST_POINTS = 128


@triton.jit(do_not_specialize=["size", "num_features"])
def _distances(features, distances, size, num_features, ROWS: tl.constexpr, P: tl.constexpr):
    """Write some rows of the squared distances between the points of each problem, ``[N, size, size]`` in fp32.

    A trillionth of the extent, the largest squared distance to the first point, is subtracted.
    """
    problem = tl.program_id(0).to(tl.int64)
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, P)
    features += problem * size * num_features
    square, from_first = tl.zeros([ROWS, P], tl.float64), tl.zeros([P], tl.float64)
    feature, more = 0, num_features > 0
    next_row = tl.load(features + rows * num_features, (rows < size) & more, 0.0).to(tl.float64)
    next_column = tl.load(features + columns * num_features, (columns < size) & more, 0.0).to(tl.float64)
    while feature < num_features:
        row, column = next_row, next_column
        first = tl.load(features + feature).to(tl.float64)
        feature += 1
        more = feature < num_features
        next_row = tl.load(features + rows * num_features + feature, (rows < size) & more, 0.0).to(tl.float64)
        next_column = tl.load(features + columns * num_features + feature, (columns < size) & more, 0.0).to(tl.float64)
        from_first += (column - first) * (column - first)
        difference = row[:, None] - column[None, :]
        square += difference * difference
    square -= 1e-12 * tl.max(tl.where(columns < size, from_first, 0.0), 0)
    # Also where features are not finite, distances are: their clusters mean nothing, but are valid.
    square = tl.where(square < 1e30, tl.where(square > 0.0, square, 0.0), 1e30).to(tl.float32)
    rows, columns = rows[:, None], columns[None, :]
    tl.store(distances + problem * size * size + rows * size + columns, square, (rows < size) & (columns < size))


@triton.jit
def _least(matrix):
    """Find the least number of each column ``[P]``, four chains of comparisons at a time."""
    P: tl.constexpr = matrix.shape[0]
    return tl.min(tl.min(tl.reshape(matrix, [P // 4, 4, P]), 0), 0)


@triton.jit
def _row(high, low, rows, row):
    """Take one row of a matrix, given as the halves of its numbers: their bits, int64 ``[P]``."""
    P: tl.constexpr = high.shape[0]
    upper = tl.sum(tl.reshape(tl.where(rows == row, high, 0), [P // 4, 4, P]), 0)
    lower = tl.sum(tl.reshape(tl.where(rows == row, low, 0), [P // 4, 4, P]), 0)
    whole = (upper.to(tl.int64) << 32) | lower.to(tl.int64)
    return tl.sum(whole, 0)


@triton.jit
def _ward(distances, size, k, points):
    """Merge single points down to k clusters, each time the pair that adds the least inertia; the first of equals.

    A cluster is known by its first point: returns that of each point ``[P]``. The matrix of the inertia that merging
    two clusters adds is symmetric; what it holds in columns of points that are not the first is not used.
    """
    P: tl.constexpr = points.shape[0]
    ABOVE: tl.constexpr = 0x7FF00000  # upper half of infinity: larger than that of every number
    LAST: tl.constexpr = 0xFFFFFFFF  # the largest lower half
    ONE: tl.constexpr = 0x3FF0000000000000  # the bits of 1
    rows, columns = points[:, None], points[None, :]
    added = tl.load(distances + rows * size + columns, (rows < size) & (columns < size), 0.0).to(tl.float64)
    # No number is negative, so their bits have their order; in halves, as GPUs find the least of 32 bits across the
    # threads of a warp in a single instruction.
    bits = (added * 0.5).to(tl.int64, bitcast=True)
    high, low = (bits >> 32).to(tl.int32), bits.to(tl.uint32)
    high = tl.where((rows < size) & (rows != columns), high, ABOVE)
    sizes = tl.full([P], 1, tl.int32)
    root = points
    left = size
    # The last merge, which is not in the matrix yet: compared with rows here and there, rather than kept as masks.
    first, second = tl.min(points - 1, 0), tl.min(points - 1, 0)  # none
    joint_high, joint_low = points, points.to(tl.uint32)
    while left > k:
        # Enter the last merge.
        high = tl.where(rows == first, joint_high[None, :], high)
        high = tl.where(columns == first, joint_high[:, None], high)
        high = tl.where(rows == second, ABOVE, high)
        low = tl.where(rows == first, joint_low[None, :], low)
        low = tl.where(columns == first, joint_low[:, None], low)
        # Find the cheapest pair, the first in the order of rows: as the matrix is symmetric, its row is the first
        # column with the least number.
        active = (root == points) & (points < size)
        column_high = tl.where(active, _least(high), ABOVE)
        best_high = tl.min(column_high, 0)
        column_low = _least(tl.where(high == best_high, low, LAST))
        hit = column_high == best_high
        best_low = tl.min(tl.where(hit, column_low, LAST), 0)
        first = tl.min(tl.where(hit & (column_low == best_low), points, P - 1), 0)
        best = (best_high.to(tl.int64) << 32) | best_low.to(tl.int64)
        first_row = _row(high, low, rows, first)
        second = tl.min(tl.where(active & (first_row == best), points, P - 1), 0)
        second_row = _row(high, low, rows, second)
        # Update the inertia that merging with the new cluster adds (Lance and Williams, 1967).
        others = active & (points != first) & (points != second)
        both = tl.sum(tl.where(points == first, sizes, 0) + tl.where(points == second, sizes * 256, 0), 0)
        first_size, second_size = both % 256, both // 256
        first_added = tl.where(others, first_row, ONE).to(tl.float64, bitcast=True)
        second_added = tl.where(others, second_row, ONE).to(tl.float64, bitcast=True)
        joint = (sizes + first_size).to(tl.float64) * first_added
        joint += (sizes + second_size).to(tl.float64) * second_added
        joint -= sizes.to(tl.float64) * best.to(tl.float64, bitcast=True)
        joint /= (sizes + first_size + second_size).to(tl.float64)
        whole = joint.to(tl.int64, bitcast=True)
        joint_high, joint_low = tl.where(others, (whole >> 32).to(tl.int32), ABOVE), whole.to(tl.uint32)
        root = tl.where(root == second, first, root)
        sizes = tl.where(points == first, first_size + second_size, sizes)
        left -= 1
    return root


@triton.jit
def _search(cost, own, own_sizes, labels, clusters, points, TIE: tl.constexpr):
    """Find the move that lowers the inertia most; of those within ``TIE``, the first in the order of cluster and point.

    ``cost [K / C, C, P]`` is what each point would add to each cluster, infinite for its own. A point at squared
    distance ``own`` from the mean of its own cluster of ``own_sizes`` points removes its part from it.

    Returns the cluster, the point and the point's own cluster as one number, for :func:`_exchange`; -1 if no move
    lowers the inertia.
    """
    K: tl.constexpr = cost.shape[0] * cost.shape[1]
    P: tl.constexpr = cost.shape[2]
    removed = tl.where(own_sizes > 1, own / tl.maximum(own_sizes - 1, 1).to(tl.float64), 0.0)
    least = tl.min(tl.min(cost.to(tl.int64, bitcast=True), 0), 0).to(tl.float64, bitcast=True)
    best = tl.max((removed - least).to(tl.int64, bitcast=True), 0).to(
        tl.float64, bitcast=True
    )  # as integers, positive numbers are in order
    gain = removed[None, None, :] - cost
    cluster = tl.min(tl.min(tl.where(gain >= (1.0 - TIE) * best, clusters, K), 0), 0)
    return tl.where(best > 0, tl.min((cluster * P + points) * 256 + labels, 0), -1)


@triton.jit
def _sum_distances(distances, labels, size, clusters, points):
    """Sum the distances of each point to the members of some clusters: ``[C, P]``."""
    total = tl.zeros([clusters.shape[0], points.shape[0]], tl.float64)
    following = tl.load(distances + points, points < size, 0.0)
    point = 0
    while point < size:
        row = following.to(tl.float64)
        label = tl.sum(tl.where(points == point, labels, 0), 0)
        point += 1
        following = tl.load(distances + point * size + points, (points < size) & (point < size), 0.0)
        total += tl.where(clusters[:, None] == label, row[None, :], 0.0)
    return total


@triton.jit
def _exchange(distances, sums, labels, size, k, max_moves, points, K: tl.constexpr, C: tl.constexpr, TIE: tl.constexpr):
    """Move single points, each time the one that lowers the inertia most, until none lowers it by ``TIE`` of its part.

    Returns the labels, and the squared distance of each point to the mean of its cluster. ``sums`` is memory for the
    distances of each point to the members of each cluster, ``[K, size]``.
    """
    P: tl.constexpr = points.shape[0]
    INFINITE: tl.constexpr = float("inf")
    chunks = tl.arange(0, K // C)[:, None, None]
    clusters = chunks * C + tl.arange(0, C)[None, :, None]
    # Compute what each point would add to each cluster, some clusters at a time.
    cost = tl.full([K // C, C, P], INFINITE, tl.float64)
    own, own_sizes = tl.zeros([P], tl.float64), tl.zeros([P], tl.int32)
    chunk = 0
    while chunk * C < k:
        some = chunk * C + tl.arange(0, C)
        total = _sum_distances(distances, labels, size, some, points)
        tl.store(sums + some[:, None] * size + points[None, :], total, points[None, :] < size)
        member = some[:, None] == labels[None, :]
        sizes = tl.sum(member.to(tl.int32), 1)[:, None]
        inertia = tl.sum(tl.where(member, total, 0.0), 1)[:, None] / tl.maximum(2 * sizes, 1).to(tl.float64)
        apart = tl.abs(total - inertia)
        own += tl.sum(tl.where(member, apart, 0.0), 0)
        own_sizes += tl.sum(tl.where(member, sizes, 0), 0)
        apart /= (1.0 - TIE) * (sizes + 1).to(tl.float64)
        apart = tl.where(member | (sizes == 0), INFINITE, apart)
        cost = tl.where(chunks == chunk, apart[None, :, :], cost)
        chunk += 1
    move = _search(cost, own, own_sizes, labels, clusters, points, TIE)
    moves = 0
    while (move >= 0) & (moves < max_moves):
        new, point, old = move // (256 * P), move // 256 % P, move % 256
        labels = tl.where(points == point, new, labels)
        in_old, in_new = labels == old, labels == new
        both = tl.sum(in_old.to(tl.int32) + 256 * in_new.to(tl.int32), 0)
        old_size, new_size = both % 256, both // 256
        # Update the sums of both clusters: once all threads see what was stored, and once all have read it.
        row = tl.load(distances + point * size + points, points < size, 0.0).to(tl.float64)
        tl.debug_barrier()
        old_sums = tl.load(sums + old * size + points, points < size, 0.0) - row
        new_sums = tl.load(sums + new * size + points, points < size, 0.0) + row
        tl.debug_barrier()
        tl.store(sums + old * size + points, old_sums, points < size)
        tl.store(sums + new * size + points, new_sums, points < size)
        # Update what depends on them.
        old_inertia = tl.sum(tl.where(in_old, old_sums, 0.0), 0) / (2 * old_size).to(tl.float64)
        new_inertia = tl.sum(tl.where(in_new, new_sums, 0.0), 0) / (2 * new_size).to(tl.float64)
        from_old, from_new = tl.abs(old_sums - old_inertia), tl.abs(new_sums - new_inertia)
        own = tl.where(in_old, from_old, tl.where(in_new, from_new, own))
        own_sizes = tl.where(in_old, old_size, tl.where(in_new, new_size, own_sizes))
        to_old = tl.where(in_old, INFINITE, from_old / ((1.0 - TIE) * (old_size + 1).to(tl.float64)))
        to_new = tl.where(in_new, INFINITE, from_new / ((1.0 - TIE) * (new_size + 1).to(tl.float64)))
        cost = tl.where(clusters == old, to_old[None, None, :], cost)
        cost = tl.where(clusters == new, to_new[None, None, :], cost)
        move = _search(cost, own, own_sizes, labels, clusters, points, TIE)
        moves += 1
    return labels, own


@triton.jit(do_not_specialize=["size", "most", "max_moves"])
def _kmeans(
    distances,
    counts,
    sums,
    assignment,
    representatives,
    size,
    most,
    max_moves,
    NEAREST: tl.constexpr,
    TIE: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    distances += problem * size * size
    sums += problem * K * size
    assignment += problem * size
    representatives += problem * most
    k = tl.maximum(tl.minimum(tl.load(counts + problem), tl.minimum(most, size)), 1)
    points = tl.arange(0, P)
    rows = points[:, None]
    first_points = _ward(distances, size, k, points)
    # Number the clusters by their first points.
    leads = ((first_points == points) & (points < size))[:, None] & (rows < first_points[None, :])
    labels = tl.where(points < size, tl.sum(leads.to(tl.int32), 0), 255)
    labels, own = _exchange(distances, sums, labels, size, k, max_moves, points, K, C, TIE)
    # Choose the representative of each point's cluster; ties are broken by lowest index.
    member = labels[:, None] == labels[None, :]
    if NEAREST:
        bits = own.to(tl.int64, bitcast=True)
        least = tl.min(tl.where(member, bits[:, None], 0x7FF0000000000000), 0).to(tl.float64, bitcast=True)
        member = member & (own[:, None] <= (least * (1.0 + TIE) + 1e-12)[None, :])
    heads = tl.min(tl.where(member, rows, P), 0)
    # Number the clusters by them.
    leads = ((heads == points) & (points < size))[:, None] & (rows < heads[None, :])
    labels = tl.sum(leads.to(tl.int32), 0)
    tl.store(assignment + points, labels.to(tl.int64), points < size)
    tl.store(representatives + labels, points.to(tl.int64), (heads == points) & (points < size))
    tl.store(representatives + points, (points * 0 + size).to(tl.int64), (points >= k) & (points < most))


@dataclass(frozen=True)
class Clusters:
    """Memory for the clusters of N problems of P points, and for what is computed on the way."""

    assignment: Tensor  # long [N, P]
    representatives: Tensor  # long [N, k_max], ascending, padded with P
    distances: Tensor  # fp32 [N, P, P], squared
    sums: Tensor  # fp64 [N, k_max rounded up to a power of two, P]


def empty_clusters(problems: int, size: int, most: int, device: torch.device) -> Clusters:
    """Allocate memory for N problems of ``size`` points in at most ``most`` clusters.

    Raises:
        ValueError: More points than the kernel can have, or more clusters than points.
    """
    if not 1 <= size <= MOST_POINTS:
        raise ValueError(f"K-means of {size} points on the GPU; valid: 1 to {MOST_POINTS}")
    if not 1 <= most <= size:
        raise ValueError(f"{size} points cannot have {most} clusters; valid: 1 to {size}")
    return Clusters(
        torch.empty(problems, size, dtype=torch.long, device=device),
        torch.empty(problems, most, dtype=torch.long, device=device),
        torch.empty(problems, size, size, device=device),
        torch.empty(problems, _padded(most, 4), size, dtype=torch.float64, device=device),
    )


def fill_clusters(clusters: Clusters, features: Tensor, counts: Tensor, *, nearest: bool, max_moves: int = 50) -> None:
    """Cluster ``features`` (fp32 ``[N, P, F]``, contiguous) into ``counts`` (int32 ``[N]``) clusters each.

    Reads no tensor on the host and allocates nothing. Counts outside of ``[1, k_max]`` are taken as the nearest of
    these. Features that are not finite have valid clusters, which mean nothing.

    Args:
        clusters: Is overwritten.
        features: Points of each problem.
        counts: k of each problem.
        nearest: The representative is the member nearest the mean (ties broken by lowest index), else the first member.
        max_moves: Limit of the moves of single points, for each problem.
    """
    problems, size, num_features = features.shape
    if clusters.assignment.shape != (problems, size) or counts.shape != (problems,):
        raise ValueError(
            f"features {tuple(features.shape)}, counts {tuple(counts.shape)} and assignment "
            f"{tuple(clusters.assignment.shape)} do not fit; valid: [N, P, F], [N] and [N, P]"
        )
    if features.dtype != torch.float32 or not features.is_contiguous() or counts.dtype != torch.int32:
        raise ValueError(
            f"features are {features.dtype} with strides {features.stride()}, counts {counts.dtype}; "
            "valid: contiguous fp32 features, int32 counts"
        )
    if not problems:
        return
    padded = _padded(size, 16)
    _distances[problems, padded // 16](
        features, clusters.distances, size, num_features, ROWS=16, P=padded, num_warps=4, enable_fp_fusion=False
    )
    _kmeans[(problems,)](
        clusters.distances,
        counts,
        clusters.sums,
        clusters.assignment,
        clusters.representatives,
        size,
        clusters.representatives.shape[1],
        max_moves,
        NEAREST=nearest,
        TIE=TIE,
        P=padded,
        K=clusters.sums.shape[1],
        **_settings(padded, clusters.sums.shape[1]),
    )


def kmeans(
    features: Tensor,
    counts: Tensor | Sequence[int],
    *,
    nearest: bool,
    max_moves: int = 50,
    most: int | None = None,
    out: Clusters | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster each problem's points into its own number of clusters, as :func:`chai.clustering.kmeans.cluster` does.

    Args:
        features: ``[N, P, F]``, computed with as fp32.
        counts: k of each problem, on the features' device or as numbers (which are copied to it).
        nearest: The representative is the member nearest the mean (ties broken by lowest index), else the first member.
        max_moves: Limit of the moves of single points, for each problem.
        most: The largest k, known without reading ``counts``; by default that of the numbers, or P for a tensor.
        out: Memory to use, see :func:`empty_clusters`.

    Returns:
        assignment ``[N, P]`` (clusters numbered by their representatives) and representatives ``[N, most]`` (ascending,
        padded with P), both long.

    Raises:
        ValueError: A number of clusters outside ``[1, P]``, more points than 128, or shapes that do not fit.
    """
    problems, size, _ = features.shape
    if not isinstance(counts, Tensor):
        for wrong in [k for k in counts if not 1 <= k <= (most or size)]:
            raise ValueError(f"{size} points cannot have {wrong} clusters; valid: 1 to {most or size}")
        most = most or max(counts, default=1)
        counts = torch.tensor(counts, dtype=torch.int32).to(features.device)
    if out is None:
        out = empty_clusters(problems, size, most or size, features.device)
    points = features.detach().float().contiguous()
    fill_clusters(out, points, counts.to(torch.int32), nearest=nearest, max_moves=max_moves)
    return out.assignment, out.representatives


def _padded(count: int, least: int) -> int:
    """Round up to a power of two, at least ``least``."""
    return max(1 << (count - 1).bit_length(), least)


def _settings(points: int, clusters: int) -> dict[str, int | bool]:
    """Return the constant C and the launch options with which no register spills, for padded sizes."""
    if points == clusters == 128:
        chunk, num_warps = 2, 8
    else:
        chunk, num_warps = min(clusters, 1024 // points, 16), {16: 1, 32: 1, 64: 4, 128: 16}[points]
    return {"C": chunk, "num_warps": num_warps, "maxnreg": min(2048 // num_warps, 255), "enable_fp_fusion": False}


def _compiled(points: int, clusters: int) -> Case:
    """Return the case of a number of points and of clusters."""
    options = _settings(points, clusters)
    constants = {"NEAREST": True, "TIE": TIE, "P": points, "K": clusters, "C": options.pop("C")}
    return Case(
        f"K-means of {points} points into {clusters} clusters",
        _kmeans,
        {"distances": "*fp32", "counts": "*i32", "sums": "*fp64", "assignment": "*i64", "representatives": "*i64"}
        | {"size": "i32", "most": "i32", "max_moves": "i32"},
        constants,
        options,
    )


COMPILED = [
    *(
        Case(
            f"distances of {size} points",
            _distances,
            {"features": "*fp32", "distances": "*fp32", "size": "i32", "num_features": "i32"},
            {"ROWS": 16, "P": size},
            {"num_warps": 4, "enable_fp_fusion": False},
        )
        for size in (32, 64, 128)
    ),
    *(_compiled(points, clusters) for points in (32, 64, 128) for clusters in (4, points // 2)),
]
