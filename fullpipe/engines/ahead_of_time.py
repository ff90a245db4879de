"""Networks compiled ahead of time with Inductor; the weights stay outside, in the module's tensors.

A package holds the kernels of one module at one set of input shapes, a few megabytes whatever the
module weighs, and loads in a fraction of a second. At load it is given the addresses of the
module's own parameters, so that any number of packages share one copy of the weights, and whoever
changes these in place (an adapter, say) changes what every package computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import aoti_compile_and_package, config
from torch.export.pt2_archive._package import AOTICompiledModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from fullpipe.engines.memory_order import MemoryOrder
from fullpipe.errors import SetupError

# cuDNN's attention is the fastest on Hopper, where it takes the shape; the others follow.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Both sides round; a fault is off by 1, or is no number.
MAX_ERROR = 0.05
OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # nor write short ones, such as biases, into kernels
    "conv_1x1_as_mm": True,  # a matrix product takes its bias and what follows into one kernel
}


def compile_package(module: nn.Module, inputs: Sequence[torch.Tensor], path: Path) -> None:
    """Compile `module` for inputs of exactly these shapes, dtypes and device, into one file.

    Args:
        module: in eval mode, its weights on the device that it will run on.
        inputs: an example of each positional input; their values do not matter.
        path: the package, `*.pt2`; its folder exists.
    """
    # Which instructions the host's part may use is tried out by compiling and running programs,
    # 10 s each. For a GPU's host part, what the processor says is good enough.
    is_for_gpu = inputs[0].device.type == "cuda"
    trust = config.patch({"cpp.vec_isa_ok": True}) if is_for_gpu else contextlib.nullcontext()
    with torch.no_grad(), _fast_attention(), trust:
        with MemoryOrder():
            exported = torch.export.export(module, tuple(inputs))
        # It writes into the options that it is given.
        aoti_compile_and_package(exported, package_path=str(path), inductor_configs=dict(OPTIONS))


def check_package(path: Path, module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Load a new package and compare it with the module in eager torch, on these inputs.

    A compiler that links the C++ library statically, for one, makes packages whose loading ends
    the process; so this is for a process that may end.

    Raises:
        SetupError: it computes something else.
    """
    package = Package(path, module, inputs[0].device)
    with torch.inference_mode():
        pairs = zip(_outputs(package(*inputs)), _outputs(module(*inputs)), strict=True)
        errors = [_relative_error(got, wanted) for got, wanted in pairs]
    for error in errors:
        if not error < MAX_ERROR:
            raise SetupError(f"{path.name} differs from eager torch by {error:.2g} of its norm")


class Package:
    """A compiled package bound to a module's weights: called like the module."""

    def __init__(self, path: Path, module: nn.Module, device: torch.device):
        """Load what `compile_package` wrote.

        Args:
            path: the package.
            module: the one that was compiled, or one with parameters of the same names and shapes;
                the caller keeps it alive, and changes its tensors only in place.
            device: where its weights are.
        Raises:
            SetupError: the file is no package of this module.
        """
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        try:
            with _left_as_it_was(device):
                self._run = AOTICompiledModel(_open(path, device))
                weights = {name: tensors[name] for name in self._run.get_constant_fqns()}
                self._run.load_constants(weights, check_full_update=True, user_managed=True)
        except (RuntimeError, KeyError, ValueError) as error:
            raise SetupError(f"{path} is no compiled package of this network: {error}") from error

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Run once; inputs as they were when it was compiled, contiguous.

        Returns:
            What the module does: a tensor, or a tuple of them.
        """
        return self._run(*inputs)


def _open(path: Path, device: torch.device) -> Any:
    """What `torch._inductor.aoti_load_package` opens, without asking for this processor first.

    It finds out what the processor can by compiling programs: 40 s, and a server needs no compiler.
    What a package was made for is in `Key`.
    """
    # Run without its own synchronisation, which a CUDA graph could not record.
    is_single_threaded, runners = True, 1
    device_index = -1 if device.type == "cpu" else device.index or 0
    return torch._C._aoti.AOTIModelPackageLoader(  # type: ignore[attr-defined]
        str(path), "model", is_single_threaded, runners, device_index
    )


def _outputs(answer: Any) -> tuple[torch.Tensor, ...]:
    return (answer,) if isinstance(answer, torch.Tensor) else tuple(answer)


def _relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.double()
    return float((got.double() - wanted).norm() / wanted.norm())


def _left_as_it_was(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For opening a package, which makes its GPU the thread's own: "cuda" would mean that one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _fast_attention() -> Iterator[None]:
    with sdpa_kernel(_ATTENTION, set_priority=True):
        yield
