"""A pretend GPU: tensors that claim to lie on "cuda:0", compute on the CPU, and refuse to meet CPU tensors, as on a real GPU.

    import pretend_cuda      before torch is imported; it makes the device, for this process and for good

A mask that was made on the wrong device is a bug that no test on a CPU can see, and most machines that run these tests have no GPU.

Two things make the device. A few lines of C++, compiled on the spot and loaded before torch looks for CUDA, tell torch that there is
one GPU: then autograd, autocast and every branch on `device.type == "cuda"` behave as with a real one. And every call of an operator
passes through `run`, which checks that devices do not mix, computes on the CPU, and marks the results as lying on the GPU.

The rules are CUDA's. A CPU tensor without dimensions counts as a number, so it may meet GPU tensors element by element. CPU indices
may pick from a GPU tensor. Only copies cross from one device to the other. The device draws random numbers from a generator of its own.
In one point it is stricter: it refuses to save a GPU tensor to a file, because a machine without a GPU could not load that file.

What it cannot show: speed, memory, rounding of GPU kernels, and compiled code. It needs Linux, g++ and a CPU build of torch.
"""

import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Hooks answer questions about CUDA as a whole, a guard those about streams and events, of which this device has none.
SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
};
namespace at { using ::CUDAHooks; REGISTER_CUDA_HOOKS(CUDAHooks) }
struct Guard : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(getDevice()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
"""


def load_hooks():
    """Compile SOURCE and load it, between torch's libraries and `import torch`. It takes three seconds."""
    assert "torch" not in sys.modules, "pretend_cuda must be imported before torch"
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    libraries = [torch_folder / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")]
    with tempfile.TemporaryDirectory() as folder:
        source, hooks = Path(folder, "hooks.cpp"), Path(folder, "hooks.so")
        source.write_text(SOURCE)
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", source, *libraries, "-o", hooks], check=True)
        for file in (*libraries, hooks):
            ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)


load_hooks()
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # no compiler knows this device: what would be compiled runs as it is

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
random_state = torch.get_rng_state()  # of the device's own generator
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# Not element by element, and yet the value may be a CPU tensor without dimensions.
FILLING = {aten.fill_.Tensor, aten.fill.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}


class Cuda(torch.Tensor):
    """A tensor without memory of its own on cuda:0. Its numbers are in `elem`, a CPU tensor of the same shape and strides."""

    @staticmethod
    def __new__(cls, elem):
        words = dict(strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype, device=CUDA)
        return torch.Tensor._make_wrapper_subclass(cls, elem.shape, **words)

    def __init__(self, elem):
        self.elem = elem

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"Cuda({self.elem!r})"

    def tolist(self):
        """torch's own reads the memory, which is not there."""
        return self.detach().cpu().tolist()

    def numpy(self, *, force=False):
        """As on a GPU: only a copy on the CPU becomes an array."""
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        return self.detach().cpu().numpy()

    def __reduce_ex__(self, protocol):
        raise RuntimeError("PRETEND CUDA: a tensor on cuda:0 is saved to a file, which a machine without a GPU could not load")


def each(function, value):
    """function(value), or of each entry where the value is a list or a tuple."""
    return type(value)(each(function, entry) for entry in value) if isinstance(value, (list, tuple)) else function(value)


def tensors_in(value):
    """The tensors of an argument, which may be a list of tensors."""
    if isinstance(value, (list, tuple)):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    return [value] if isinstance(value, torch.Tensor) else []


def is_cpu(tensor):
    """True for an ordinary tensor on the CPU."""
    return not isinstance(tensor, Cuda) and tensor.device.type == "cpu"


@functools.cache
def facts(func):
    """(the names of an operator's arguments, those it writes to, whether it returns just these, whether it goes element by element)."""
    arguments, returns = func._schema.arguments, func._schema.returns
    written = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
    same = bool(written and returns) and all(r.alias_info and r.alias_info.is_write for r in returns)
    return [a.name for a in arguments], written, same, torch.Tag.pointwise in func.tags or func in FILLING


def check(func, given):
    """Raise RuntimeError, as CUDA would, if an operator is given GPU tensors together with CPU tensors that it cannot take."""
    names, written, _, elementwise = facts(func)
    if func in COPIES:
        return
    for name, value in given.items():
        for tensor in filter(is_cpu, tensors_in(value)):
            if func in INDEXING:  # a tensor, its indices, its new values
                fits = name == names[1] or (name in names[2:3] and tensor.dim() == 0)
            else:
                fits = elementwise and tensor.dim() == 0 and name not in written
            if not fits:
                raise RuntimeError("PRETEND CUDA: Expected all tensors to be on the same device, but "
                                   f"argument {name} {tuple(tensor.shape)} of {func} is on the CPU")  # fmt: skip


def run(func, args, kwargs):
    """One call of an operator: checked, computed on the CPU, its results put on the device where CUDA would put them."""
    tensors = tensors_in([*args, *kwargs.values()])
    any_cuda = any(isinstance(tensor, Cuda) for tensor in tensors)
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    to_cuda = asked.type == "cuda" if asked else any_cuda
    if not any_cuda and not to_cuda:
        return func(*args, **kwargs)
    names, names_written, returns_written, _ = facts(func)
    given = dict(zip(names, args)) | kwargs
    if any_cuda and any(map(is_cpu, tensors)):
        check(func, given)
    plain_kwargs = {name: each(plain, value) for name, value in kwargs.items()} | ({"device": CPU} if asked else {})
    out = with_device_generator(func, each(plain, tuple(args)), plain_kwargs)
    # What an operator writes to is returned as it came in, for it is the same tensor and not a new one.
    written = [given[name] for name in names_written if name in given]
    for tensor in tensors_in(written):
        if isinstance(tensor, Cuda) and (tensor.elem.shape != tensor.shape or tensor.elem.stride() != tensor.stride()):
            raise NotImplementedError(f"PRETEND CUDA: {func} changes the shape of a tensor in place")
    if written and returns_written:
        count = len(func._schema.returns)
        return written[0] if count == 1 else tuple(written[:count])
    return each(on_cuda, out) if to_cuda else out


def plain(value):
    """An argument as the CPU takes it."""
    return value.elem if isinstance(value, Cuda) else value


def on_cuda(value):
    """A result as it lies on the device."""
    return Cuda(value) if isinstance(value, torch.Tensor) and is_cpu(value) else value


def with_device_generator(func, args, kwargs):
    """func(*args, **kwargs), where an operator that draws random numbers takes them from the device's generator."""
    global random_state
    if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
        return func(*args, **kwargs)
    of_the_cpu = torch.get_rng_state()
    torch.set_rng_state(random_state)
    try:
        return func(*args, **kwargs)
    finally:
        random_state = torch.get_rng_state()
        torch.set_rng_state(of_the_cpu)


class Mode(TorchDispatchMode):
    """Sends every call of an operator to `run`, also those that have no GPU tensor yet and are asked to make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


# ---------------------------------------------------------------------------------------------------------------------
# What torch.cuda says about the device
# ---------------------------------------------------------------------------------------------------------------------
def seed(number):
    """torch.manual_seed seeds the generators of all devices, and so this one."""
    global random_state
    random_state = torch.Generator().manual_seed(int(number) % 2**63).get_state()


def set_random_state(state, device=None):
    """The device's generator goes on from this state."""
    global random_state
    random_state = state.clone()


# Each name gets a function of its own: torch's compiler, which looks through them, accepts none under two names.
cuda = torch.cuda
cuda._lazy_init = lambda: None
cuda.set_device = lambda device: None
cuda.is_available = lambda: True
cuda.is_bf16_supported = lambda *_: True
cuda.is_current_stream_capturing = lambda: False
cuda.device_count = lambda: 1
cuda.max_memory_allocated = lambda *_: 0
cuda.manual_seed = lambda number: seed(number)
cuda.manual_seed_all = lambda number: seed(number)
cuda.get_rng_state = lambda *_: random_state.clone()
cuda.set_rng_state = set_random_state
torch.__future__.set_swap_module_params_on_conversion(True)  # model.to("cuda") replaces weights: they cannot change their memory
# `torch.tensor(..., device="cuda")` and `x[[0, 1]]` look for a kernel of the device without asking any mode.
library = torch.library.Library("aten", "IMPL")
for name in ("empty_strided", "copy_", "_local_scalar_dense"):
    operator = getattr(aten, name).default
    library.impl(name, lambda *args, operator=operator, **kwargs: run(operator, args, kwargs), "CUDA")
mode = Mode()
mode.__enter__()
