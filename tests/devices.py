"""Devices that aren't there: tensors that compute on the CPU but insist on being on some other device.

A product of tensors of two devices fails as it does on real ones, so a model that is divided among pretended devices
shows whether everything that it meets follows its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import PreTrainedModel

PRETENDED = "elsewhere"
backend_registration._setup_privateuseone_for_python_backend(PRETENDED)  # for good, hence a process of its own


class Elsewhere(Tensor):
    """A tensor that says it is on a pretended device; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            dtype=held.dtype,
            device=device,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
        )
        made.held = held
        return made

    def __init__(self, held: Tensor, device: torch.device) -> None:
        pass

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """Lets tensors be made on, and moved to, pretended devices."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})


class MadeElsewhere(TorchFunctionMode):
    """Lets ``torch.tensor`` make tensors on pretended devices, which no dispatch mode sees."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            return function(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


def dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do it on the CPU; refuse two devices in one operation; say where the result is."""
    copies = function in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    places = {one.device for one in tensors if one.device.type == PRETENDED or one.ndim}  # numbers may come from a CPU
    if function is torch.ops.aten.index_put_.default or function is torch.ops.aten.index.Tensor:
        places = {args[0].device} | (places - {torch.device("cpu")})  # indices may come from a CPU as well
    if len(places) > 1 and not copies:
        raise RuntimeError(
            f"{function}: expected all tensors to be on the same device, found {sorted(map(str, places))}"
        )
    target = kwargs.get("device")
    if target is None:
        target = args[0].device if copies else next(iter(places), torch.device("cpu"))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(Elsewhere, lambda one: one.held, (args, kwargs))
    found = function(*plain_args, **plain_kwargs)
    if torch.device(target).type != PRETENDED:
        return found
    known = {id(one.held): one for one in tensors if isinstance(one, Elsewhere)}  # in place: the same object again
    return tree_map_only(
        Tensor, lambda one: known[id(one)] if id(one) in known else Elsewhere(one, torch.device(target)), found
    )


@contextmanager
def divided(model: PreTrainedModel, places: list[int]) -> Iterator[PreTrainedModel]:
    """The model's layers on pretended devices, all else on the first; with the hooks by which accelerate divides it.

    Args:
        model: restored afterwards.
        places: the device of each layer.
    """
    decoder, parts = model.get_decoder(), [(model, places[0])]
    parts += [(part, places[0]) for name, part in decoder.named_children() if name != "layers"]
    parts += list(zip(decoder.layers, places, strict=True))
    kept: list[tuple[nn.Module, str, str, Any]] = []

    def move(module: nn.Module, device: torch.device) -> None:
        for part in module.modules():
            for kind in ("_parameters", "_buffers"):
                held = getattr(part, kind)
                for name, tensor in held.items():
                    if tensor is None or isinstance(tensor, Elsewhere) or tensor.device.type == PRETENDED:
                        continue
                    kept.append((part, kind, name, tensor))
                    moved = Elsewhere(tensor.detach(), device)
                    held[name] = nn.Parameter(moved, requires_grad=False) if kind == "_parameters" else moved

    try:
        with Everywhere(), MadeElsewhere(), torch.no_grad():
            for module, place in reversed(parts):  # what is left is the model's own
                device = torch.device(PRETENDED, place)
                move(module, device)
                skip = model._skip_keys_device_placement
                for part in module.modules() if module is not model else [model]:
                    hook = AlignDevicesHook(device, io_same_device=part is model, skip_keys=skip)
                    hook.init_hook = lambda module: module  # type: ignore[method-assign]
                    add_hook_to_module(part, hook)
            yield model
    finally:
        remove_hook_from_submodules(model)
        for part, kind, name, tensor in kept:
            getattr(part, kind)[name] = tensor
