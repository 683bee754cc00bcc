"""A step that takes as long as its caller wants: each row names a FIFO, which is read to its end; empty rows take no time."""

import threading
from pathlib import Path

import numpy
import torch

from tensorway.model import Inputs, Model, Outputs


class Gate(Model):
    """Answers with the thread's name, whether inference mode is on, and the number of torch threads."""

    def forward(self, inputs: Inputs) -> Outputs:
        for path in inputs["gate"]:
            if path:
                Path(path.decode()).read_bytes()
        told = f"{threading.current_thread().name} {torch.is_inference_mode_enabled()} {torch.get_num_threads()}".encode()
        return {"thread": numpy.array([told] * len(inputs["gate"]), dtype=object)}
