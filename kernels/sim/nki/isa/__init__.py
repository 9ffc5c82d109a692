"""`nki.isa`: one function for each instruction, keyword style, destination first."""

from nkisim.errors import NkiValidationError
from nkisim.isa.affine import affine_select, iota
from nkisim.isa.common import (
    dge_mode,
    dma_engine,
    engine,
    matmul_perf_mode,
    nc_version,
    oob_mode,
    reduce_cmd,
)
from nkisim.isa.control import (
    core_barrier,
    get_nc_sub_version,
    get_nc_version,
    register_alloc,
    register_load,
    register_move,
    register_store,
    sendrecv,
)
from nkisim.isa.dma import dma_compute, dma_copy, dma_transpose
from nkisim.isa.matmul import nc_matmul
from nkisim.isa.move import (
    local_gather,
    memset,
    nc_n_gather,
    nc_stream_shuffle,
    nc_transpose,
    tensor_copy,
    tensor_copy_predicated,
)
from nkisim.isa.mx import nc_matmul_mx, quantize_mx
from nkisim.isa.random import dropout, rand2, rand_get_state, rand_set_state, rng, set_rng_seed
from nkisim.isa.reduce import (
    activate2,
    activation,
    activation_reduce,
    exponential,
    range_select,
    select_reduce,
    tensor_scalar_cumulative,
    tensor_scalar_reduce,
)
from nkisim.isa.search import (
    bn_aggr,
    bn_stats,
    max8,
    nc_find_index8,
    nc_match_replace8,
    nonzero_with_count,
    sequence_bounds,
    topk,
)
from nkisim.isa.vector import (
    reciprocal,
    scalar_tensor_tensor,
    tensor_partition_reduce,
    tensor_reduce,
    tensor_scalar,
    tensor_tensor,
    tensor_tensor_scan,
)
from nkisim.registers import VirtualRegister
from nkisim.trace import Instruction as NkiInstruction

tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown


def __getattr__(name):
    raise AttributeError(f"nisa.{name} is not modelled by this simulator (or is not an NKI 0.3-0.6 instruction)")


__all__ = [name for name in dir() if not name.startswith("_")]
