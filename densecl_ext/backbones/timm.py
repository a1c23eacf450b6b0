"""Any timm network as a backbone: its last features as a grid (N, C, h, w)."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ext.backbones.convolutions import (
    explain_reflection,
    left_out_parts,
    set_padding,
    warn_truncated,
)

TIMM = "timm/"

# How timm's networks are told to take images of other sizes than their own: vision transformers by
# the first, window transformers by the second; the rest either take any size or one alone.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)


class TimmBackbone(nn.Module):
    """A timm network without its classifier.

    Tokens become a grid, and prefix tokens (class, distillation, registers) are dropped, since they
    lie at no place of the image. Channels-last outputs are permuted; what is (N, C, h, w) already
    stays. At other image sizes than its own a vision transformer resamples its position embedding
    in every forward, so weights keep timm's shapes whatever the size.

    The state dict has timm's own keys, those of ``timm.create_model(name, num_classes=0)``.

    Args:
        name: timm's name of the network, with ``timm/`` before it or not.
        output_stride: 8, 16 or 32, or None for the network's own. By timm's ``output_stride``
            (dilation) where the network has it; else its last stages are left out, with a warning.
        padding: "zeros", "reflect" or "replicate", of all convolutions.
        truncate: leave the last stages out even where timm could dilate them.
        in_channels: channels of the images.

    Attributes:
        name: "timm/..." .
        network: timm's module.
        out_channels: C of the feature map.
        stride: pixels between neighbouring positions of the grid.
        native_size: height and width of the images that timm made the network for.
        padding: as given.
        left_out: names of the modules that a truncated network does not have.
        last_index: which of timm's intermediate features a truncated network ends with, or None.

    Raises:
        ValueError: timm has no such network, its features are no grid, or it has no way to the
            output stride or the padding.
        ImportError: timm is not installed.

    Shape:
        (N, in_channels, H, W) to (N, C, h, w), h = H / stride and w = W / stride:
        (N, 384, 14, 14) of ``timm/vit_small_patch16_224`` at 224 pixels.
    """

    def __init__(
        self,
        name: str,
        *,
        output_stride: int | None = None,
        padding: str = "zeros",
        truncate: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.name, self.padding = TIMM + name.removeprefix(TIMM), padding
        self.last_index: int | None = None
        self.left_out: tuple[str, ...] = ()
        self._take(create_timm(name, any_size=True, in_chans=in_channels))
        if output_stride is not None and output_stride != self.stride:
            self._reach(output_stride, truncate)
        set_padding(self.network, padding, self.name)

    def _take(self, network: Any) -> None:
        self.network = network
        self.prefix_tokens = int(getattr(network, "num_prefix_tokens", 0))
        self.native_size = tuple(network.default_cfg["input_size"][1:])
        self.stride = 1
        self._settle_grid()

    def forward(self, images: Tensor) -> Tensor:
        """The last features, after the network's own final norm where it has one."""
        try:
            features = self._features(images)
        except AssertionError as error:  # what timm raises for an image size it cannot take
            raise self._unfit(images) from error
        except RuntimeError as error:
            explain_reflection(error, self.name, self.padding, images)
            raise
        if features.dim() == 3:  # (N, prefix + h * w, C)
            height, width = (side // self.stride for side in images.shape[2:])
            tokens = features[:, self.prefix_tokens :]
            if tokens.shape[1] != height * width:
                raise self._unfit(images)
            return tokens.transpose(1, 2).unflatten(2, (height, width))
        if self._channels_last:
            return features.permute(0, 3, 1, 2)
        return features

    def _features(self, images: Tensor) -> Any:
        if self.last_index is None:
            return self.network.forward_features(images)
        return intermediate_features(self.network, self.last_index, images)

    def _reach(self, output_stride: int, truncate: bool) -> None:
        """Get to an output stride other than the network's own, by dilation or truncation."""
        own = self.stride
        if output_stride < own and not truncate:
            try:
                dilated = create_timm(
                    self.name, output_stride=output_stride, in_chans=self.in_channels
                )
            except (
                TypeError,
                AssertionError,
                NotImplementedError,
            ):  # timm has no such option there
                pass
            else:
                dilated.load_state_dict(self.network.state_dict())
                self._take(dilated)
        if self.stride == output_stride:
            return
        stages = [stage["reduction"] for stage in getattr(self.network, "feature_info", ())]
        if output_stride > own or output_stride not in stages:
            raise ValueError(
                f"build_backbone: {self.name} has no features of output_stride {output_stride}; "
                f"its stages have {', '.join(str(stride) for stride in sorted({own, *stages}))}"
            )
        before = list(self.network.state_dict())
        self.last_index = len(stages) - 1 - stages[::-1].index(output_stride)
        self.network.prune_intermediate_layers([self.last_index], prune_norm=True, prune_head=True)
        self.left_out = left_out_parts(before, self.network.state_dict())
        self._settle_grid()
        if not truncate:
            warn_truncated(self.name, output_stride, self.left_out)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's, by timm's own names."""
        return self.network.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # `state_dict` is this call's own: torch copies it on the way down, and the children are
        # served from it after this.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}network.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _unfit(self, images: Tensor) -> ValueError:
        height, width = images.shape[2:]
        return ValueError(
            f"{self.name}: images must have {self.native_size[0]} x {self.native_size[1]} pixels, "
            f"or, where the network takes any size, sides that are multiples of {self.stride}, "
            f"got {height} x {width}"
        )

    @property
    def classifiers(self) -> tuple[str, ...]:
        """Where timm's own weights files keep the classifier that is left out here."""
        names = self.network.default_cfg.get("classifier") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    def _settle_grid(self) -> None:
        """Find out C, the stride and the layout from one image of the native size."""
        height, width = self.native_size
        device = next(self.network.parameters()).device
        with torch.no_grad():
            self.network.eval()
            features = self._features(
                torch.zeros(1, self.in_channels, height, width, device=device)
            )
            self.network.train()
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        # timm gives intermediate features as (N, C, h, w)
        of_network = getattr(self.network, "output_fmt", "NCHW") if self.last_index is None else ""
        self._channels_last = of_network == "NHWC"
        if len(shape) == 3:
            positions, self.out_channels = shape[1] - self.prefix_tokens, shape[2]
            self.stride = max(1, round((height * width / max(1, positions)) ** 0.5))
            is_grid = (height // self.stride) * (width // self.stride) == positions
        elif len(shape) == 4:
            self.out_channels, rows = (shape[3], shape[1]) if self._channels_last else shape[1:3]
            self.stride = max(1, round(height / rows))
            is_grid = self.last_index is not None or self.out_channels == self.network.num_features
        else:
            is_grid = False
        if not is_grid:
            raise ValueError(
                f"build_backbone: {self.name} gives features {shape or type(features).__name__} "
                f"for an image of {height} x {width}, which are no grid of positions"
            )


def intermediate_features(network: Any, index: int, images: Tensor) -> Tensor:
    """Features (N, C, h, w) after one of a timm network's stages, without a final norm."""
    return network.forward_intermediates(
        images, indices=[index], stop_early=True, intermediates_only=True
    )[-1]


def create_timm(name: str, *, any_size: bool = False, **options: Any) -> Any:
    """Build timm's network at a random start, without its classifier; nothing is downloaded.

    Args:
        name: timm's name, with ``timm/`` before it or not.
        any_size: let it take images of other sizes where timm can.
        **options: further ones of ``timm.create_model``.

    Raises:
        ValueError: timm has no such network.
        TypeError: the network has no such option.
        ImportError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"build_backbone: {name!r} needs timm, which cannot be imported ({error}); "
            "pip install 'densecl_ext[timm]'"
        ) from error
    name = name.removeprefix(TIMM)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ValueError(
            f"build_backbone: timm {timm.__version__} has no network {name!r}"
            + (f"; did you mean {TIMM}{near[0]}?" if near else "")
        )
    for sizes in _ANY_SIZE if any_size else ({},):
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, **sizes, **options)
        except TypeError:  # the network has no such option
            if not sizes:
                raise
    raise AssertionError


def timm_shapes(name: str) -> dict[str, torch.Size]:
    """Names and shapes of a timm network's state dict, without allocating its weights."""
    with torch.device("meta"):
        return {key: value.shape for key, value in create_timm(name).state_dict().items()}
