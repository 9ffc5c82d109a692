"""PyTorch's bf16 linear (oneDNN inside) as a peer. Needs `pip install torch numpy`; see common.py."""

import common
import torch

args = common.arguments()
torch.set_num_threads(args.threads)
torch.set_grad_enabled(False)
torch.manual_seed(3)
weight = (torch.rand(args.n, args.k) * 0.04 - 0.02).bfloat16()
weights = [weight.clone() for _ in range(common.copies(2 * args.n * args.k))]
x = (2 * torch.rand(args.m, args.k) - 1).bfloat16()
calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
common.serve(f"PyTorch {torch.__version__.split('+')[0]} bf16", 2 * args.n * args.k, calls)
