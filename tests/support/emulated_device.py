"""An emulated accelerator for machines without one: a device whose tensors hold their data on the CPU.

:func:`install` registers it with torch as ``emulated``; a process that has it cannot give it up, so tests use it in a
process of their own. As on a GPU, a CPU tensor with dimensions may not meet a tensor of the device, and a tensor of the
device has no NumPy array. :data:`COUNTS` counts operations, transfers and the element types of matrix products, and
:func:`live` lists the device's tensors that are still referenced.
"""

import collections
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._device import _device_constructors  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,  # pyright: ignore[reportPrivateUsage]
    _setup_privateuseone_for_python_backend,  # pyright: ignore[reportPrivateUsage]
)
from transformers import PreTrainedModel

NAME = "emulated"
COUNTS: collections.Counter = collections.Counter()
"""``("op", name)``, ``("product", dtype, TF32)``, ``"launch"`` (an operation that is not a view), ``"to device"``,
``"from device"``, ``"read"`` (a number, or the size of a result)."""
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Matrix products, and the place of their first factor."""
SIZED_BY_DATA = (
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "nonzero",
    "masked_select",
    "repeat_interleave",
)
"""Operations whose result has a size that the host must read."""
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""Operations that accept indices on the CPU."""
_storages: "weakref.WeakValueDictionary[int, EmulatedTensor]" = weakref.WeakValueDictionary()


class MixedDevicesError(RuntimeError):
    """An operation got a tensor of the CPU together with one of the device."""


class _Module(_DummyBackendModule):
    """What ``torch.emulated`` offers to libraries."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def _lazy_init(self) -> None: ...
    def set_device(self, device: Any) -> None: ...
    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None:
        COUNTS["emptied"] += 1

    def is_bf16_supported(self) -> bool:
        return True


class EmulatedTensor(torch.Tensor):
    """A tensor of the device; ``data_on_cpu`` holds its numbers."""

    data_on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> "EmulatedTensor":
        """Wrap a CPU tensor, without a copy."""
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=torch.device(NAME, 0),
        )
        made.data_on_cpu = data
        _storages[id(made)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        return f"EmulatedTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = EmulatedTensor(self.data_on_cpu.detach().clone())
            memo[id(self)] = nn.Parameter(copied) if isinstance(self, nn.Parameter) else copied
            memo[id(self)].requires_grad_(self.requires_grad)
        return memo[id(self)]


def live() -> list[EmulatedTensor]:
    """List the tensors of the device that are still allocated; none is collected for this."""
    return list(_storages.values())


def _ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _plain(x: Any) -> Any:
    """Replace a tensor or a device by the CPU's."""
    if isinstance(x, EmulatedTensor):
        return x.data_on_cpu
    return torch.device("cpu") if isinstance(x, torch.device) and _ours(x) else x


def _move(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Copy between devices, or within the device."""
    source = args[1] if func._schema.name == "aten::copy_" else args[0]
    if func._schema.name == "aten::copy_":
        there = isinstance(args[0], EmulatedTensor)
    else:
        there = _ours(kwargs.get("device") or source.device)
    here = isinstance(source, EmulatedTensor)
    if here != there:
        COUNTS["to device" if there else "from device"] += 1
    options = {k: _plain(v) for k, v in kwargs.items() if k not in ("non_blocking", "pin_memory")}
    made = func(*map(_plain, args), **options)
    if func._schema.name == "aten::copy_":
        return args[0]
    made = made.clone() if made is _plain(source) else made
    return EmulatedTensor(made) if there else made


def _check(base: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """Refuse operands on different devices, as CUDA does.

    Raises:
        MixedDevicesError: A CPU tensor with dimensions meets a tensor of the device.
    """
    foreign = [x for x in tensors if not isinstance(x, EmulatedTensor) and x.dim() > 0]
    if base in INDEXED and isinstance(args[0], EmulatedTensor):
        indices = [x for x in args[1] if x is not None]
        foreign = [x for x in foreign if not any(x is index for index in indices)]
    if foreign:
        raise MixedDevicesError(
            f"{base}: CPU tensors {[tuple(x.shape) for x in foreign]} with tensors of {NAME}"
        )


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU data of its tensors."""
    base = func._schema.name
    if base in ("aten::_to_copy", "aten::copy_"):
        return _move(func, args, kwargs)
    if func._can_decompose():
        found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if base == "aten::_local_scalar_dense":
        COUNTS["read"] += 1
        return func(_plain(args[0]))
    _check(base, args, tensors)
    short = base.removeprefix("aten::")
    COUNTS["op", short] += 1
    COUNTS["launch"] += not _is_view(func)
    COUNTS["read"] += short in SIZED_BY_DATA
    if short in PRODUCTS:
        COUNTS["product", args[PRODUCTS[short]].dtype, torch.backends.cuda.matmul.allow_tf32] += 1
    known = {id(x.data_on_cpu): x for x in tensors if isinstance(x, EmulatedTensor)}
    made = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return (
            known[id(x)] if id(x) in known else EmulatedTensor(x)
        )  # an operation in place returns its operand

    return tree_map(wrapped, made)


def _is_view(func: Any) -> bool:
    """Whether an operation returns its operand's data without a change, for which a GPU launches nothing."""
    returned = func._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def _apply(self: nn.Module, move: Any, recurse: bool = True) -> nn.Module:
    """Move a module's tensors, tied ones once; ``Module._apply`` sets ``Parameter.data``, which wrappers refuse."""
    moved: dict[int, Any] = {}
    for module in self.modules() if recurse else [self]:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    with torch.no_grad():
                        made = move(tensor)
                    if isinstance(tensor, nn.Parameter) and made is not tensor:
                        made = nn.Parameter(made.detach(), requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = (made, tensor)
                tensors[name] = moved[id(tensor)][0]
    return self


def install() -> torch.device:
    """Register the device with torch in this process, and return it."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return EmulatedTensor(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return EmulatedTensor(torch.empty_strided(size, stride, dtype=dtype))

    def arange(*bounds: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
        return EmulatedTensor(torch.arange(*bounds, dtype=dtype))  # torch's own resizes an empty tensor

    for overload in ("arange", "arange.start", "arange.start_step"):
        library.impl(overload, arange, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    _kept.append(library)
    _device_constructors()  # caches the functions of torch that `with torch.device(...)` affects, before two change
    nn.Module._apply = _apply  # pyright: ignore[reportAttributeAccessIssue]
    torch.tensor = _built_on_cpu(torch.tensor)
    torch.as_tensor = _built_on_cpu(torch.as_tensor)
    # It indexes with a Python list, which torch turns into a tensor of the device below the wrappers' reach.
    PreTrainedModel.warn_if_padding_and_no_attention_mask = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    return torch.device(NAME, 0)


def _built_on_cpu(build: Any) -> Any:
    """Build a tensor from Python numbers on the CPU and move it; torch does this below the wrappers' reach."""

    def built(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> torch.Tensor:
        if not _ours(device):
            return build(data, device=device, **options, **({"requires_grad": True} if requires_grad else {}))
        return build(data, **options).to(device).requires_grad_(requires_grad)

    return built


_kept: list[Any] = []
"""Libraries of kernels, which unregister them when they are collected."""
