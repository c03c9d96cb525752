"""Run as a process of its own by `test_estimate.py`: the resident memory that a few steps of a training take, at their peak."""

import json
import sys
import tempfile

import torch
from benchmarks._timing import peak_resident, resident_bytes

from refine_nsp.training import ReFINETrainer
from tests.estimate.measured_models import LARGE, SMALL, arguments, model_of


def train(name: str, sizes: dict, folder: str) -> None:
    model, args = model_of(name, sizes), arguments(name, folder)
    rows = [{"input_ids": torch.randint(0, 512, (args.max_length,)).tolist()} for _ in range(4)]
    ReFINETrainer(model=model.train(), args=args, train_dataset=rows).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train(sys.argv[1], SMALL, folder)  # after it the process has what it needs whatever the model
        before = resident_bytes()
        with peak_resident() as peak:
            train(sys.argv[1], LARGE, folder)
        sys.stdout.write(json.dumps({"bytes": peak() - before}))
