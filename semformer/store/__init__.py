"""Content-addressed artifacts of stages, in a folder or a bucket: found by key, published once, built by one process.

`Store` has keys, artifacts and single flight; a `storage.Storage` keeps the bytes (`folder`, `bucket`). Who builds what
is said by `leases`, what is needed by `roots`; `collection` removes the rest, and `reasons` tells why something is to
be made.
"""

from semformer.store.artifact import Artifact, DamagedArtifact
from semformer.store.leases import Lease, LeaseHeld, LeaseHolder, LeaseLost
from semformer.store.storage import StorageUnreachable
from semformer.store.store import Store, open_store

__all__ = [
    "Artifact",
    "DamagedArtifact",
    "Lease",
    "LeaseHeld",
    "LeaseHolder",
    "LeaseLost",
    "StorageUnreachable",
    "Store",
    "open_store",
]
