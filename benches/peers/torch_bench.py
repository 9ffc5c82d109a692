"""PyTorch's bf16 linear (oneDNN inside) beside trn-kernels. Needs `pip install torch numpy`.

From the root of the repository:  python benches/peers/torch_bench.py --threads 2
"""

import common
import torch

args = common.arguments(__doc__, "mxfp4,fp8-block,bf16")
torch.set_num_threads(args.threads)
torch.set_grad_enabled(False)
torch.manual_seed(3)
print(f"PyTorch {torch.__version__}, {args.threads} threads; each row beside trnk bench matmul in {args.rounds} rounds")
for n, k in args.shapes:
    weight = (torch.rand(n, k) * 0.04 - 0.02).bfloat16()
    weights = [weight.clone() for _ in range(common.copies(2 * n * k))]
    for m in args.m:
        x = (2 * torch.rand(m, k) - 1).bfloat16()
        calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
        common.compare(args, "torch bf16 linear", (n, k), m, 2 * n * k, calls)
