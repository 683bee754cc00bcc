"""A step that takes as long as its input says."""

import threading
import time

import numpy
import torch

from tensorway.model import Inputs, Model, Outputs


class Slow(Model):
    """Sleeps for the largest of `seconds`; answers with the thread's name and whether gradients are off."""

    def forward(self, inputs: Inputs) -> Outputs:
        time.sleep(float(inputs["seconds"].max()))
        told = f"{threading.current_thread().name} {torch.is_inference_mode_enabled()} {torch.get_num_threads()}".encode()
        return {"thread": numpy.array([told] * len(inputs["seconds"]), dtype=object)}
