"""Whether the kernels that were just built compute what they should: a loss, by every instruction set and on a GPU.

    check_build.py PACKAGE TORCH        (the folders that hold them; setup.py runs it)

Status 0 if they do, and where that cannot be tried.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

PACKAGE = sys.argv[1]
sys.path[:0] = sys.argv[1:]
try:
    import torch
except Exception as error:  # a torch for another Python, say: its headers are as good
    print(f"selfreg_fast: its kernels are built, but not tried: torch cannot be imported here ({error})")
    sys.exit(0)

import selfreg_fast as srf  # noqa: E402

SIZES = (9, 13), (5, 7), (9, 13)


def computes(backend: str, name: str) -> bool:
    """Whether the loss of exits (one is interpolated, in the others a class is masked) and a gradient are right."""
    exits = [torch.linspace(i, 99 + i, 2 * 21 * h * w).sin() * 5 for i, (h, w) in enumerate(SIZES)]
    exits = [z.view(2, 21, h, w) for z, (h, w) in zip(exits, SIZES, strict=True)]
    exits[0][:, 3] = exits[2][:, 3] = -torch.inf
    labels = torch.arange(2 * 9 * 13).remainder(3).view(2, 9, 13)

    def loss_and_gradient(backend: str, dtype: torch.dtype) -> torch.Tensor:
        device = "cuda" if backend == "cuda" else "cpu"
        leaves = [z.to(device, dtype, copy=True).requires_grad_() for z in exits]
        loss = srf.self_regulation_loss(leaves, labels.to(device), backend=backend).total
        loss.backward()
        return torch.cat([loss.detach().view(1), leaves[1].grad.view(-1)]).double().cpu()

    expected = loss_and_gradient("reference", torch.float64)
    for dtype in (torch.float32, torch.float64):
        found = loss_and_gradient(backend, dtype)
        if not torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected[1:].abs().max())):
            print(
                f"selfreg_fast: {name} kernels, {dtype}: loss {found[0]}, and should be {expected[0]}; the gradient "
                f"is off by {float((found - expected)[1:].abs().max()):.1e}",
                flush=True,
            )
            return False
    return True


def computes_by(isa: str) -> bool:
    """The same by an instruction set, or the best that this machine has. A process of its own: each chooses once."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    os.environ["SELFREG_FAST_ISA"] = isa
    status = 1
    try:
        status = not computes("cpu", isa)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> int:
    """The status. The package tried is the one in PACKAGE, and no other that Python might find."""
    state = srf.backends()["cpu"]
    if state != "available" or not Path(srf.__file__).is_relative_to(PACKAGE):
        print(f"selfreg_fast in {srf.__file__}: CPU kernels: {state}")
        return 1
    right, tried = all(computes_by(isa) for isa in ("baseline", "avx2", "avx512")), "cpu"
    if srf.backends()["cuda"] == "available":
        try:
            torch.zeros(1, device="cuda")
        except RuntimeError as error:
            print(f"selfreg_fast: its CUDA kernels are built, but not tried: the GPU is not to be had ({error})")
        else:
            right, tried = computes("cuda", "cuda") and right, "cpu, cuda"
    if right:
        print(f"selfreg_fast: losses of the kernels are right ({tried})")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
