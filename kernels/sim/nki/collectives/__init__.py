"""`nki.collectives`: names only. A launch here is one device, and the official simulator has no collectives either."""

from nkisim.errors import UnspecifiedError as _UnspecifiedError
from nkisim.nkiobject import NKIObject as _NKIObject

_NAMES = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_v", "collective_permute",
    "collective_permute_implicit", "collective_permute_implicit_reduce",
    "collective_permute_implicit_current_processing_rank_id", "rank_id",
)  # fmt: skip


class ReplicaGroup(_NKIObject):
    """Groups of ranks that take part in a collective, as lists of ranks."""

    def __init__(self, replica_groups):
        self.replica_groups = replica_groups


def _refusal(name):
    def collective(*args, **kwargs):
        raise _UnspecifiedError(f"nki.collectives.{name} needs several devices; one launch here is one device")

    collective.__name__ = name
    return collective


globals().update({name: _refusal(name) for name in _NAMES})


def __getattr__(name):
    raise AttributeError(f"nki.collectives.{name} is not modelled by this simulator")
