"""llama.cpp's MXFP4 matmul, through the C API of ggml, beside trn-kernels. Needs `pip install llama-cpp-python numpy` (the
package compiles llama.cpp, which takes a C++ compiler and some minutes).

From the root of the repository:  python benches/peers/llama_bench.py --threads 2
"""

import ctypes
import importlib.util
import pathlib
import sys
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p

import common
import numpy

F32, Q8_0, MXFP4 = 0, 8, 39  # enum ggml_type


def library(folder, name):
    found = sorted(folder.rglob(f"lib{name}.so*"))
    if not found:
        sys.exit(f"no lib{name}.so under {folder}: is llama-cpp-python built with shared libraries?")
    return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)


def function(lib, name, result, *arguments):
    found = getattr(lib, name)
    found.restype, found.argtypes = result, list(arguments)
    return found


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


args = common.arguments(__doc__, "mxfp4")
package = importlib.util.find_spec("llama_cpp")
if package is None:
    sys.exit("llama-cpp-python is not installed: pip install llama-cpp-python")
folder = pathlib.Path(package.origin).parent
base, cpu = library(folder, "ggml-base"), library(folder, "ggml-cpu")
init = function(base, "ggml_init", c_void_p, InitParams)
free = function(base, "ggml_free", None, c_void_p)
tensor = function(base, "ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
mul_mat = function(base, "ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
new_graph = function(base, "ggml_new_graph_custom", c_void_p, c_void_p, c_size_t, c_bool)
expand = function(base, "ggml_build_forward_expand", None, c_void_p, c_void_p)
allocate = function(base, "ggml_backend_alloc_ctx_tensors", c_void_p, c_void_p, c_void_p)
release = function(base, "ggml_backend_buffer_free", None, c_void_p)
upload = function(base, "ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
compute = function(base, "ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
row_size = function(base, "ggml_row_size", c_size_t, c_int, c_int64)
quantize = function(
    base, "ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p
)
backend = function(cpu, "ggml_backend_cpu_init", c_void_p)()
function(cpu, "ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)(backend, args.threads)

print(f"ggml of {folder}, {args.threads} threads; each row beside trnk bench matmul in {args.rounds} rounds")
random = numpy.random.default_rng(3)
for n, k in args.shapes:
    for name, kind in (("MXFP4", MXFP4), ("Q8_0", Q8_0)):
        size = row_size(kind, k) * n
        values = (random.standard_normal((n, k)) * 0.02).astype(numpy.float32)
        codes = numpy.empty(size, numpy.uint8)
        quantize(kind, values.ctypes.data, codes.ctypes.data, 0, n, k, None)
        count = common.copies(size)
        for m in args.m:
            context = init(InitParams((4 * count + 16) << 12, None, True))
            x = tensor(context, F32, k, m)
            weights = [tensor(context, kind, k, n) for _ in range(count)]
            graphs = []
            for weight in weights:
                graph = new_graph(context, 8, False)
                expand(graph, mul_mat(context, weight, x))
                graphs.append(graph)
            memory = allocate(context, backend)
            if not memory:
                sys.exit(f"ggml could not allocate {count} matrices of {size} bytes")
            for weight in weights:
                upload(weight, codes.ctypes.data, 0, size)
            data = (2 * random.random((m, k)) - 1).astype(numpy.float32)
            upload(x, data.ctypes.data, 0, data.nbytes)
            calls = [lambda graph=graph: compute(backend, graph) for graph in graphs]
            common.compare(args, f"llama.cpp {name}", (n, k), m, size, calls)
            release(memory)
            free(context)
