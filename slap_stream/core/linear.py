"""Linear algebra of the regression and the metric: one thread, so that sums come out alike."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from slap_stream.types import Float32Array, FloatArray

Float = TypeVar("Float", bound=np.floating[Any])

# Rows whose products are added up in float32, before they go to a float64 sum. Fixed, so that a
# sum does not depend on how the rows came.
ROWS_AT_A_TIME = 256
# Rows of a triangle that are inverted at a time.
_SMALL = 40
# Column blocks that a product with a triangle is made in; what is zero is left out.
_BLOCK = 104

_blas = ThreadpoolController().select(user_api="blas").lib_controllers


class single_threaded:
    """Context in which BLAS uses one thread: its sums then do not depend on the machine's cores.

    Threadpoolctl's own context costs several times as much, above all when its code is not in the
    caches.
    """

    __slots__ = ()

    # The number of threads is the process's, and several loaders may compose at the same time: of
    # the contexts that want one thread, the first and the last set it.
    _lock = threading.Lock()
    _users = 0
    _before: ClassVar[list[tuple[Any, int]]] = []

    def __enter__(self) -> None:
        shared = single_threaded
        with shared._lock:
            shared._users += 1
            if shared._users > 1:
                return
            before = [(library, library.get_num_threads()) for library in _blas]
            shared._before = [(library, count) for library, count in before if count != 1]
            for library, _ in shared._before:
                _set_threads(library, 1)

    def __exit__(self, *error: object) -> None:
        shared = single_threaded
        with shared._lock:
            shared._users -= 1
            if not shared._users:
                for library, count in shared._before:
                    _set_threads(library, count)


def _set_threads(library: Any, count: int) -> None:
    """Have a library use so many threads, whichever thread asks for it.

    Threadpoolctl lets only one thread of a process set those of OpenBLAS, and silently does nothing
    for all others.
    """
    of_one_thread = library.internal_api == "openblas"
    if of_one_thread:
        library.clear_controlling_thread(force=True)
    library.set_num_threads(count)
    if of_one_thread:
        library.clear_controlling_thread(force=True)


def normalised(rows: NDArray[Float]) -> NDArray[Float]:
    """Scale each row to unit length; a zero row stays zero.

    `kernels.unit_rows` is the compiled one, of which a row's bits depend on that row alone.

    Args:
        rows: (n, dim) floats.

    Returns:
        (n, dim), a new array in the same precision.
    """
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[Float] = np.divide(rows, np.where(norm > 0, norm, 1), dtype=rows.dtype)
    return unit


def row_chunks(parts: Sequence[Float32Array]) -> Iterator[Float32Array]:
    """Rows in chunks of `ROWS_AT_A_TIME`, the last one shorter, however they are parted.

    Args:
        parts: (n_i, columns) each.
    """
    held: list[Float32Array] = []
    count = 0
    for part in parts:
        start = 0
        while start < len(part):
            piece = part[start : start + ROWS_AT_A_TIME - count]
            held.append(piece)
            start, count = start + len(piece), count + len(piece)
            if count == ROWS_AT_A_TIME:
                yield held[0] if len(held) == 1 else np.concatenate(held)
                held, count = [], 0
    if held:
        yield held[0] if len(held) == 1 else np.concatenate(held)


def inverse_of_triangle(lower: NDArray[np.floating[Any]]) -> FloatArray:
    """Inverse of a lower triangular matrix by blocks of rows, in a fifth of the usual time.

    Args:
        lower: (n, n), with a diagonal without zeros; what is above it is not read.
    """
    out = np.zeros_like(lower)
    for first in range(0, len(lower), _SMALL):
        last = min(first + _SMALL, len(lower))
        own = np.tril(np.linalg.inv(np.tril(lower[first:last, first:last])))
        out[first:last, first:last] = own
        out[first:last, :first] = -own @ (lower[first:last, :first] @ out[:first, :first])
    return out


def power_after(rows: Float32Array, upper: Float32Array) -> FloatArray:
    """(n,) squared lengths of rows (n, columns) times an upper triangular matrix.

    Args:
        rows: (n, columns) float32.
        upper: (columns, columns) float32, zero below the diagonal.
    """
    power = np.zeros(len(rows))
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        some = rows[start : start + ROWS_AT_A_TIME]
        for left in range(0, len(upper), _BLOCK):
            right = min(left + _BLOCK, len(upper))
            product = some[:, :right] @ upper[:right, left:right]
            power[start : start + len(some)] += np.einsum("ij,ij->i", product, product)
    return power


def leading_directions(
    apply: Callable[[FloatArray], FloatArray], start: FloatArray, *, rounds: int
) -> FloatArray:
    """Orthonormal directions that a symmetric positive map stretches most, nearly.

    Args:
        apply: Maps (dim, k) columns to (dim, k) columns.
        start: (dim, k) any columns; some more than are wanted make the wanted ones more exact.
        rounds: Multiplications by the map.

    Returns:
        (dim, k) orthonormal columns, in no order.

    Reference: randomised subspace iteration, Halko, Martinsson and Tropp, 2011, algorithm 4.4.
    """
    basis = start
    for _ in range(rounds):
        basis = np.linalg.qr(apply(basis))[0]
    return basis
