"""The networks of the ESRGAN family, and how a checkpoint tells which one it is: by its tensors' names and shapes.

RRDB is ESRGAN's (arXiv:1809.00219) and Real-ESRGAN's (arXiv:2107.10833), Compact the latter's small one. Both take and
give RGB in 0 to 1, (1, 3, h, w) to (1, 3, h * scale, w * scale), and have `scale`.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional

Tensors = dict[str, Tensor]
_RESIDUAL = 0.2  # how much of a block's output is added to its input


class Compact(nn.Module):
    """Convolutions at the small size, whose last one draws the pixels between; the nearest pixel is added to it."""

    def __init__(self, features: int, layers: int, scale: int):
        super().__init__()
        self.scale = scale
        body: list[nn.Module] = [nn.Conv2d(3, features, 3, padding=1), nn.PReLU(features)]
        for _ in range(layers):
            body += [nn.Conv2d(features, features, 3, padding=1), nn.PReLU(features)]
        self.body = nn.Sequential(*body, nn.Conv2d(features, 3 * scale**2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        nearest = functional.interpolate(x, scale_factor=self.scale, mode="nearest")
        return functional.pixel_shuffle(self.body(x), self.scale) + nearest


class RRDB(nn.Module):
    """Residual-in-residual dense blocks at the small size, then doublings. A large picture may first be folded
    (`unshuffle`), which is how Real-ESRGAN's networks for factors below 4 begin."""

    def __init__(self, features: int, blocks: int, growth: int, doublings: int, unshuffle: int = 1):
        super().__init__()
        self.scale = 2**doublings // unshuffle
        self.unshuffle = unshuffle
        self.conv_first = nn.Conv2d(3 * unshuffle**2, features, 3, padding=1)
        self.body = nn.Sequential(*(_Block(features, growth) for _ in range(blocks)))
        self.conv_body = nn.Conv2d(features, features, 3, padding=1)
        self.conv_up = nn.ModuleList(nn.Conv2d(features, features, 3, padding=1) for _ in range(doublings))
        self.conv_hr = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        right, below = -width % self.unshuffle, -height % self.unshuffle
        x = functional.pad(x, (0, right, 0, below), mode="replicate")
        x = self.conv_first(functional.pixel_unshuffle(x, self.unshuffle))
        x = x + self.conv_body(self.body(x))
        for conv in self.conv_up:
            x = _leaky(conv(functional.interpolate(x, scale_factor=2, mode="nearest")))
        x = self.conv_last(_leaky(self.conv_hr(x)))
        return x[..., : height * self.scale, : width * self.scale]


class _Block(nn.Module):
    def __init__(self, features: int, growth: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (_DenseBlock(features, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + _RESIDUAL * self.rdb3(self.rdb2(self.rdb1(x)))


class _DenseBlock(nn.Module):
    """Five convolutions, each of which sees what all before it have found."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        for i in range(1, 6):
            given, found = features + (i - 1) * growth, growth if i < 5 else features
            self.add_module(f"conv{i}", nn.Conv2d(given, found, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for i in range(1, 5):
            seen = torch.cat([seen, _leaky(self.get_submodule(f"conv{i}")(seen))], 1)
        return x + _RESIDUAL * self.get_submodule("conv5")(seen)


def _leaky(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, 0.2)


def build(tensors: Tensors) -> Compact | RRDB | None:
    """The network of a checkpoint with its weights in it, None where it is of another kind.

    Raises RuntimeError, KeyError or ValueError for one that begins like one of these two and then is not.
    """
    tensors = _bare(tensors)
    if "body.1.weight" in tensors and tensors["body.1.weight"].ndim == 1:
        network: Compact | RRDB = _compact(tensors)
    elif {"model.0.weight", "conv_first.weight"} & tensors.keys():
        tensors = _renamed(tensors)
        if "body.0.rdb1.conv1.weight" not in tensors or any("conv1x1" in name for name in tensors):
            return None
        network = _rrdb(tensors)
    else:
        return None
    network.load_state_dict(tensors)
    return network


def _compact(tensors: Tensors) -> Compact:
    last = max(int(name.split(".")[1]) for name in tensors)
    features, given = tensors["body.0.weight"].shape[:2]
    drawn = tensors[f"body.{last}.weight"].shape[0]
    scale = round((drawn / 3) ** 0.5)
    if given != 3 or drawn != 3 * scale**2:
        raise ValueError(f"it takes {given} channels and draws {drawn}; an upscaler takes and gives RGB")
    return Compact(features, (last - 2) // 2, scale)


def _rrdb(tensors: Tensors) -> RRDB:
    features, given = tensors["conv_first.weight"].shape[:2]
    unshuffle = round((given / 3) ** 0.5)
    if given != 3 * unshuffle**2 or tensors["conv_last.weight"].shape[0] != 3:
        raise ValueError(f"it takes {given} channels; an upscaler takes and gives RGB")
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("body."))
    doublings = sum(bool(re.fullmatch(r"conv_up\.\d+\.weight", name)) for name in tensors)
    return RRDB(features, blocks, tensors["body.0.rdb1.conv1.weight"].shape[0], doublings, unshuffle)


def _bare(tensors: Tensors) -> Tensors:
    """Without a prefix that all names have: training programs wrap a network before they save it."""
    for prefix in ("module.", "netG.", "params_ema.", "params."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


# ESRGAN's two layouts and Real-ESRGAN's, in the order in which they are tried.
_NAMES = (
    (r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(\w+)", r"body.\1.rdb\2.conv\3.\4"),
    (r"model\.1\.sub\.\d+\.(weight|bias)", r"conv_body.\1"),
    (r"RRDB_trunk\.(\d+)\.RDB(\d)\.conv(\d)\.(\w+)", r"body.\1.rdb\2.conv\3.\4"),
    (r"trunk_conv\.(\w+)", r"conv_body.\1"),
    (r"HRconv\.(\w+)", r"conv_hr.\1"),
)


def _renamed(tensors: Tensors) -> Tensors:
    """The tensors of an RRDB by the names they have here."""
    # The oldest layout numbers what follows the blocks: the doublings, then the last two convolutions.
    tail = sorted(
        {int(name.split(".")[1]) for name in tensors if re.fullmatch(r"model\.\d+\.(weight|bias)", name)} - {0}
    )
    numbered = {n: f"conv_up.{i}" for i, n in enumerate(tail)}
    numbered |= dict(zip(tail[-2:], ("conv_hr", "conv_last"), strict=False))
    return {_name(name, numbered): tensor for name, tensor in tensors.items()}


def _name(name: str, numbered: dict[int, str]) -> str:
    if found := re.fullmatch(r"model\.(\d+)\.(weight|bias)", name):
        return f"{numbered.get(int(found[1]), 'conv_first')}.{found[2]}"
    if found := re.fullmatch(r"(?:upconv|conv_up)(\d)\.(\w+)", name):
        return f"conv_up.{int(found[1]) - 1}.{found[2]}"
    for pattern, ours in _NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return name
