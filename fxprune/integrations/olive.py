"""Compression as a pass of Microsoft's Olive, which has to be installed: `pip install olive-ai`.

`python -m fxprune.integrations.olive` prints Olive's package configuration with this pass among its own. `olive run
--package-config` reads such a file in place of Olive's, and finds the pass by it.
"""

from __future__ import annotations

import inspect
import json
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

import fxprune

try:
    from olive.common.config_utils import validate_config
    from olive.data.config import DataConfig
    from olive.model import ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.pass_config import PassConfigParam
except ImportError as error:
    raise ImportError(f"the pass for Olive needs Olive ({error}): pip install olive-ai") from error

__all__ = ["FxPrune", "package_config"]

logger = logging.getLogger("olive.fxprune")  # Olive shows what its own loggers say, and no others

# what JSON cannot say, and a part of a model: the ONNX file is one of the whole, whose inputs only its owner knows
_LEFT_OUT = ("model", "loader", "evaluate", "input_fn", "labels", "submodule")
_SETTINGS = [name for name in inspect.signature(fxprune.compress).parameters if name not in _LEFT_OUT]


class FxPrune(Pass):  # type: ignore[misc]  # Olive is not always there to tell its type
    """Cuts a PyTorch network as `fxprune.compress` does, and hands on its ONNX file, which agrees with torch."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        """The settings of `fxprune.compress`, which knows their defaults, and where the images come from."""
        images = "Calibration images, in batches that `fxprune.compress` reads."
        return {
            "data_config": PassConfigParam(type_=DataConfig | dict, required=True, description=images),
            **{
                name: PassConfigParam(type_=Any, description=f"As for `fxprune.compress`: {name}.")
                for name in _SETTINGS
            },
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> ONNXModelHandler:
        images = validate_config(config.data_config, DataConfig).to_data_container().create_dataloader()
        given = {name: value for name in _SETTINGS if (value := getattr(config, name)) is not None}
        small = fxprune.compress(model.load_model(), images, **given)
        logger.info("%s", fxprune.report(small))
        path = resolve_onnx_path(output_model_path)
        fxprune.export_onnx(small, path)
        return ONNXModelHandler(model_path=path)


def package_config() -> dict[str, Any]:
    """Olive's own package configuration, with this pass in it."""
    known: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    ours = json.loads(files("fxprune.integrations").joinpath("olive.json").read_text())
    return {**known, "passes": {**known["passes"], **ours["passes"]}}


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=4))
