"""Logs what `fxprune compress --out OUT/` left as one MLflow run: `python log_to_mlflow.py OUT/`."""

import sys
from pathlib import Path

import mlflow
import onnx

import fxprune


def log(folder: Path) -> str:
    """Log settings, figures, files, the ONNX file and the trainable network; returns the run's id."""
    small = fxprune.load(folder)
    report = fxprune.report(small)
    with mlflow.start_run() as run:
        mlflow.log_params({"cut": ", ".join(report.plan.chosen), "seed": report.seed})
        mlflow.log_metrics(report.metrics)
        for name in ("plan.json", "report.json", "report.html"):
            mlflow.log_artifact(str(folder / name))
        # one file: the default splits its weights off
        mlflow.onnx.log_model(onnx.load(folder / "model.onnx"), name="onnx", save_as_external_data=False)
        # a network without pickles: fxprune.load(PATH) gives it back, to run or to train
        mlflow.log_artifacts(str(folder), "fxprune")
    return run.info.run_id


if __name__ == "__main__":
    print(log(Path(sys.argv[1])))
