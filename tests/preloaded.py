"""What the fork server imports before it forks ranks: all that each would import or do for itself.

A fork server can be told to import and nothing else, so importing this file does something: it
compiles a function. The first compilation fills tables of torch, which takes 2 to 3 CPU seconds.
"""

import torch
import torch._inductor.compile_fx
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
import torch.testing._internal.distributed.fake_pg

import tests.parity.cases  # noqa: F401  the functions that most tests call are there

torch.set_num_threads(1)  # a forked process would hang at its first matrix product
with torch.no_grad():  # where there are GPUs, autograd starts threads, and no fork may have them
    torch.compile(torch.nn.Linear(2, 2), backend="aot_eager", fullgraph=True)(torch.ones(1, 2))
torch._dynamo.reset()
