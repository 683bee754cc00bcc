"""How the saved module is called: it wants the sampling rate too, and keeps state that rows of different callers must not share."""

import torch

from tensorway.model import Inputs, Outputs

SAMPLING_RATE_HZ = 16000


def call(module: torch.nn.Module, inputs: Inputs) -> Outputs:
    """audio [rows, 512] -> speech_probability [rows], every row as the beginning of a recording."""
    module.reset_states()
    return {"speech_probability": module(inputs["audio"], SAMPLING_RATE_HZ).squeeze(1)}
