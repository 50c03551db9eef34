"""Sparse matrices by rows (CSR), as torch has them."""

import warnings

import torch
from torch import Tensor

torch.sparse.check_sparse_tensor_invariants.disable()  # else torch warns that nobody has decided about it
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def row_ends(rows: Tensor, n: int) -> Tensor:
    """(n + 1,): where each of n rows begins, and ends, among elements that are sorted by their `rows`."""
    ends = torch.zeros(n + 1, dtype=torch.int64, device=rows.device)
    ends[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    return ends


def sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix of elements in any order."""
    order = rows.argsort(stable=True)
    return torch.sparse_csr_tensor(row_ends(rows, shape[0]), columns[order], values[order], shape)
