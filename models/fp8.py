"""Linear layers in FP8: weights and inputs in eight bits, every row of them with a scale of its own.

A row x becomes x / s in float8_e4m3fn with s = max |x| / 448, its largest number, so that no row depends on another. A
product sums up in float32 what the eight-bit numbers give, times both rows' scales, and is rounded once, to bfloat16.
Source: the format is that of arXiv:2209.05433; scales by row, of inputs as they come, are those of arXiv:2208.07339.
"""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

from models.errors import InvalidRequest

FP8 = torch.float8_e4m3fn
MULTIPLE = 16  # both sides of a layer have to be multiples of it for scaled_mm

# To put a number into eight bits, memory is read twice and written once, 5 bytes; what the product saves for it is half
# of two operations per output. So a GPU that does 200 of them, in bfloat16, while it moves a byte gains from about here
# on: a reckoning for an H100, not a measurement.
NARROWEST = 1024


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, k) in eight bits, contiguous, and their scales (n, 1) in float32. Rows of zeros stay zeros."""
    largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32)
    scale = (largest / torch.finfo(FP8).max).clamp(min=torch.finfo(torch.float32).tiny)
    # Written where it belongs, so that a float32 copy of x need not lie in memory.
    return torch.div(x, scale, out=torch.empty(x.shape, dtype=FP8, device=x.device)), scale


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (n, k) times the transpose of a quantised weight (m, k) with its scales (m, 1): (n, m) in bfloat16."""
    eight, own = quantised(x)
    by_row = ScalingType.RowWise
    return scaled_mm(eight, weight.T, own, by_row, scale.T, by_row, bias=bias, output_dtype=torch.bfloat16)


class Fp8Linear(nn.Linear):
    """A frozen linear layer of bfloat16 with its weights in eight bits: (..., in) -> (..., out).

    Whatever is hooked on it sees inputs and outputs in bfloat16. The bias is the layer's own. It stays in its
    precision: cast to another one it cannot be called.
    """

    scale: torch.Tensor

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear's own would make weights
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight, scale = quantised(layer.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, self.in_features)
        return product(rows, self.weight, self.scale, self.bias).view(*input.shape[:-1], self.out_features)


def quantise(unet: nn.Module, narrowest: int = NARROWEST) -> None:
    """Puts a UNet's attention and feed-forward layers into FP8, one after the other; the UNet is in bfloat16.

    What sees a row's time or size stays as it is: few numbers, on which the whole picture depends. So does a prompt's
    way to keys and values, which are made once for many steps (models.attention), and the way into and out of each
    stack of transformers: a hundredth of SDXL's work, but what is lost there is lost to the picture itself. Raises
    InvalidRequest where no layer has `narrowest` outputs.
    """
    chosen = [
        f"{path}.{name}"
        for path, module in unet.named_modules()
        for name in _layers(module)
        if _pays(module.get_submodule(name), narrowest)
    ]
    if not chosen:
        raise InvalidRequest("fp8", f"no linear layer has {narrowest} outputs, from which FP8 pays; set it to false")
    for path in chosen:
        layer = unet.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        unet.set_submodule(path, Fp8Linear(layer))


def _layers(module: nn.Module) -> tuple[str, ...]:
    """What in a part of a network sees every position of a picture, by its path in there."""
    if isinstance(module, Attention):
        return ("to_q", "to_out.0") if module.is_cross_attention else ("to_q", "to_k", "to_v", "to_out.0")
    return ("net.0.proj", "net.2") if isinstance(module, FeedForward) else ()


def _pays(layer: nn.Module, narrowest: int) -> bool:
    if not isinstance(layer, nn.Linear) or layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        return False
    return layer.out_features >= narrowest


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises InvalidRequest where a UNet cannot run in FP8."""
    if device.type != "cuda":
        raise InvalidRequest("fp8", f"FP8 needs an NVIDIA GPU and the device is {device}; set it to false")
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise InvalidRequest(
            "fp8", f"FP8 goes with bfloat16 and dtype is {name}; set that to bfloat16 or this to false"
        )
    try:
        try_product(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        needs = "it takes compute capability 8.9 or more and a torch that knows this GPU; set it to false"
        raise InvalidRequest("fp8", f"this GPU does not multiply FP8 with scales by row ({error}); {needs}") from error


def try_product(device: torch.device) -> None:
    """Raises RuntimeError or ValueError where a device cannot do a product: torch knows that by trying alone."""
    ones = torch.ones(2 * MULTIPLE, 2 * MULTIPLE, device=device, dtype=torch.bfloat16)
    if not bool((product(ones, *quantised(ones), bias=None) == 2 * MULTIPLE).all()):
        raise RuntimeError("a product of ones is wrong")
