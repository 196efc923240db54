"""Offloading: a module that lives on the CPU and is on the GPU only while it computes."""

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from diffusers import ModelMixin


class WhileUsed(ModelHook):
    """Puts a module on `device` while it is called. Its weights stay on the CPU, so nothing is carried back."""

    def __init__(self, device: torch.device):
        self.device = device
        self.away: list[tuple[dict[str, Any], str, torch.Tensor]] = []

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.come_home()  # a call that failed, out of memory perhaps, never came to post_forward
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                self.away += [(held, name, tensor) for name, tensor in held.items() if tensor is not None]
        for held, name, tensor in self.away:
            held[name] = tensor.to(self.device, non_blocking=True)
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self.come_home()
        return output

    def come_home(self) -> None:
        for held, name, tensor in self.away:
            held[name] = tensor
        self.away = []


def offload(module: torch.nn.Module, device: torch.device) -> None:
    """Keeps a module on the CPU except while it computes on `device`."""
    # An autoencoder is never called itself, only its parts are: `decode` calls post_quant_conv, then decoder.
    for part in module.children() if isinstance(module, ModelMixin) else [module]:
        add_hook_to_module(part, WhileUsed(device))
