"""A second device for machines that have none: real numbers, kept apart from the processor's.

Tensors sent to :data:`APART` hold their values in ordinary memory but claim to be elsewhere, as a
GPU's do, and every operation is checked as CUDA checks it: operands on two devices are an error,
unless one is a number (a CPU tensor without dimensions), a CPU index into a tensor, or the
operation copies. PyTorch lets the meta device be claimed without a driver for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

APART: Final = torch.device("meta")
_CPU: Final = torch.device("cpu")
_ATEN: Final = torch.ops.aten
_COPIES: Final = {_ATEN.copy_.default, _ATEN._to_copy.default}
_INDEXES: Final = {
    _ATEN.index.Tensor,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
    _ATEN.index_put.default,
}


class _Apart(torch.Tensor):
    """A tensor of the second device."""

    held: torch.Tensor
    # What comes of it is of the class that the operation says, not always of this one.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        """Wrap values."""
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=APART,
        )
        made.held = inner
        return made

    def tolist(self) -> Any:
        """As CUDA's: values come over."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch's stub lacks the classmethod.
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Operate."""
        return _operate(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Sends Python's numbers to the second device by way of the processor, as PyTorch does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call."""
        kwargs = kwargs or {}
        if func in {torch.tensor, torch.as_tensor} and kwargs.get("device") == APART:
            return func(*args, **kwargs | {"device": _CPU}).to(APART)
        if func in {torch.Tensor.__getitem__, torch.Tensor.__setitem__}:
            where = tuple(map(_listed, args[1])) if type(args[1]) is tuple else _listed(args[1])
            args = (args[0], where, *args[2:])
        return func(*args, **kwargs)


def _listed(index: Any) -> Any:
    return torch.tensor(index) if isinstance(index, list) else index


class _Devices(TorchDispatchMode):
    """Makes what is asked for on the second device there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operate."""
        return _operate(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within, tensors can be made on, and sent to, the device that is given."""
    with _Literals(), _Devices():
        yield APART


def _operate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        # Made of others; without autograd, PyTorch leaves it to us to take it apart.
        with _Devices():
            return func.decompose(*args, **kwargs)
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    there = any(isinstance(tensor, _Apart) for tensor in tensors)
    if any(tensor.is_meta and not isinstance(tensor, _Apart) for tensor in tensors):
        raise NotImplementedError(f"{func}: a tensor that was made past this file")
    if there and func not in _COPIES:
        first = tensors[0]
        for tensor in tensors:
            inside = isinstance(tensor, _Apart)
            number = not inside and tensor.ndim == 0
            index = func in _INDEXES and isinstance(first, _Apart) and tensor.dtype in _WHOLE
            if not (inside or number or index):
                raise RuntimeError(f"{func}: operands on two devices: {_places(tensors)}")
    asked = kwargs.get("device")
    goes = there if asked is None else torch.device(asked) == APART
    if asked is not None and torch.device(asked) == APART:
        kwargs = kwargs | {"device": _CPU}
    inner_args, inner_kwargs = tree_map(_inside, (args, kwargs))
    found = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable:
        return _same(func, args, kwargs, found)
    return tree_map(_outside, found) if goes else found


_WHOLE: Final = (torch.int64, torch.int32, torch.bool, torch.uint8)


def _inside(value: Any) -> Any:
    return value.held if isinstance(value, _Apart) else value


def _outside(value: Any) -> Any:
    return _Apart(value) if isinstance(value, torch.Tensor) else value


def _same(func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> Any:
    """What an operation in place gives back: the tensors it was given to write to."""
    written = [
        kwargs[a.name] if a.name in kwargs else args[i]
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None
        and a.alias_info.is_write
        and (a.name in kwargs or i < len(args))
    ]
    count = len(func._schema.returns)
    if count == 0:
        return found
    return written[0] if count == 1 else tuple(written[:count])


def _places(tensors: list[torch.Tensor]) -> str:
    return ", ".join(
        f"{'apart' if isinstance(t, _Apart) else 'cpu'}{list(t.shape)}" for t in tensors
    )
