"""llama.cpp's quantized matmul as a peer, through the C API of ggml. Needs `pip install llama-cpp-python numpy` (the package
compiles llama.cpp, which takes a C++ compiler and some minutes); see common.py. The format is mxfp4 or q8_0."""

import ctypes
import importlib.util
import pathlib
import sys
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p

import common
import numpy

F32 = 0  # enum ggml_type
FORMATS = {"mxfp4": 39, "q8_0": 8}


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


args = common.arguments()
package = importlib.util.find_spec("llama_cpp")
if package is None:
    sys.exit("llama-cpp-python is not installed: pip install llama-cpp-python")
folder = pathlib.Path(package.origin).parent
base, cpu = library(folder, "ggml-base"), library(folder, "ggml-cpu")
init = function(base, "ggml_init", c_void_p, InitParams)
tensor = function(base, "ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
mul_mat = function(base, "ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
new_graph = function(base, "ggml_new_graph_custom", c_void_p, c_void_p, c_size_t, c_bool)
expand = function(base, "ggml_build_forward_expand", None, c_void_p, c_void_p)
allocate = function(base, "ggml_backend_alloc_ctx_tensors", c_void_p, c_void_p, c_void_p)
upload = function(base, "ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
download = function(base, "ggml_backend_tensor_get", None, c_void_p, c_void_p, c_size_t, c_size_t)
compute = function(base, "ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
row_size = function(base, "ggml_row_size", c_size_t, c_int, c_int64)
quantize = function(
    base, "ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p
)
backend = function(cpu, "ggml_backend_cpu_init", c_void_p)()
function(cpu, "ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)(backend, args.threads)

n, k, m, kind = args.n, args.k, args.m, FORMATS[args.format]
random = numpy.random.default_rng(3)
size = row_size(kind, k) * n
values = (random.standard_normal((n, k)) * 0.02).astype(numpy.float32)
codes = numpy.empty(size, numpy.uint8)
quantize(kind, values.ctypes.data, codes.ctypes.data, 0, n, k, None)
count = common.copies(size)
context = init(InitParams((4 * count + 16) << 12, None, True))
x = tensor(context, F32, k, m)
weights = [tensor(context, kind, k, n) for _ in range(count)]
results = [mul_mat(context, weight, x) for weight in weights]
graphs = []
for result in results:
    graphs.append(new_graph(context, 8, False))
    expand(graphs[-1], result)
if not allocate(context, backend):
    sys.exit(f"ggml could not allocate {count} matrices of {size} bytes")
for weight in weights:
    upload(weight, codes.ctypes.data, 0, size)
data = (2 * random.random((m, k)) - 1).astype(numpy.float32)
upload(x, data.ctypes.data, 0, data.nbytes)

# It computes the product, or it is no peer: 4 bits leave an error of some percent.
if compute(backend, graphs[0]) != 0:
    sys.exit("ggml could not compute the product")
got = numpy.empty((m, n), numpy.float32)
download(results[0], got.ctypes.data, 0, got.nbytes)
exact = data[:1].astype(numpy.float64) @ values.T.astype(numpy.float64)
error = numpy.linalg.norm(got[:1] - exact) / numpy.linalg.norm(exact)
if not error < 0.2:
    sys.exit(f"ggml's product is off by {error:.2f}")
common.serve(f"llama.cpp {args.format}", size, [lambda graph=graph: compute(backend, graph) for graph in graphs])
