"""Print what the host takes, where no GPU does the rest: ``python tests/launch/host_time.py``.

Of an update of 224 weights, and of an eager block-sparse product, forward and backward, launched
against the stub of the driver. Thread time on one thread. What the CPU spends on large fills and
sums is left out: a GPU does them beside the host.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))

import stub_driver
from triton_sparsity.kernels.pattern import Block
from triton_sparsity.kernels.product import BlockProduct, update_products

WEIGHTS, RUNS = 224, 150
LARGE = 2**16  # elements
KINDS = ("magnitude, blocks, each", "magnitude, fine, global")


def report(what, run, left_out, stub):
    for _ in range(5):
        run()
    times = []
    for _ in range(RUNS):
        left_out.clear()
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start - sum(left_out))
        stub.forget()
    times.sort()
    print(f"{what}: best {times[0] * 1e3:.2f} ms, median {times[RUNS // 2] * 1e3:.2f} ms")


def timed(function, left_out):
    """Note the time of calls that take or give many elements."""

    def call(*args, **options):
        start = time.thread_time()
        result = function(*args, **options)
        tensors = [result, *(a for a in args if isinstance(a, torch.Tensor))]
        if max(t.numel() for t in tensors) >= LARGE:
            left_out.append(time.thread_time() - start)
        return result

    return call


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    left_out = []
    library = stub_driver.build(Path(tempfile.mkdtemp()))
    with stub_driver.installed(library) as stub:
        product = BlockProduct(
            Block(64, 64), (256, 256), torch.bfloat16, backend="auto", dispatch="sparse"
        )
        grid = torch.arange(16).view(4, 4) % 2 == 0
        update_products([product], [grid], [8])
        w, x, grad = (torch.zeros(n, 256, dtype=torch.bfloat16) for n in (256, 64, 64))
        w.requires_grad_()
        x.requires_grad_()

        def multiply():
            torch.autograd.grad(product(x, w, None), (x, w), grad)

        report("block-sparse linear, forward and backward", multiply, left_out, stub)

        # what kernels would write and the host reads is zero, as the launch tests have it
        empty, new_empty = torch.empty, torch.Tensor.new_empty
        torch.zeros = timed(torch.zeros, left_out)
        torch.Tensor.sum = timed(torch.Tensor.sum, left_out)

        def zeros(*shape, **options):
            return (empty if options.get("device") == "meta" else torch.zeros)(*shape, **options)

        def small_zeros(tensor, *shape, **options):
            made = new_empty if tensor.numel() >= 4096 else torch.Tensor.new_zeros  # a mask
            return made(tensor, *shape, **options)

        torch.empty, torch.empty_like = zeros, torch.zeros_like
        torch.Tensor.new_empty = small_zeros
        from test_counts import CONFIGS, sparse_model

        for kind in KINDS:
            _, controller = sparse_model(None, WEIGHTS, config=CONFIGS[kind])
            update = controller.set_sparsity_level
            report(f"update, {kind}", lambda update=update: update(0.5), left_out, stub)


if __name__ == "__main__":
    main()
