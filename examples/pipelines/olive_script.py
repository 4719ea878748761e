"""What Olive asks for: the network with its weights, and the calibration images, as both passes read them."""

from __future__ import annotations

from pathlib import Path

from net import build
from olive.data.registry import Registry
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import transforms


def network(weights: str) -> nn.Module:
    """The trained network; Olive gives the path that its configuration calls `model_path`."""
    model: nn.Module = build()
    model.load_state_dict(load_file(weights))
    return model.eval()


@Registry.register_dataset()
def calibration_images(folder: str, size: int) -> list[dict[str, Tensor]]:
    """Every image of a folder, under the name that the ONNX file gives its input."""
    prepare = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return [{"input": prepare(Image.open(path).convert("RGB"))} for path in sorted(Path(folder).iterdir())]
