"""Sparse matrices by rows (CSR), as torch has them."""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import pad

torch.sparse.check_sparse_tensor_invariants.disable()  # else torch warns that nobody has decided about it
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def by_rows(counts: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A matrix (n, width) of elements that are given row by row, `counts` (n,) in each.

    Its indices have 32 bits: half the memory of 64, and quicker products.
    """
    ends = pad(counts.cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(ends.int(), columns.int(), values, (len(counts), width))
