"""As a device would: every step takes 50 ms, and no core meanwhile."""

import threading

from tensorway.model import Inputs, Model, Outputs


class Paced(Model):
    """Doubles numbers."""

    def forward(self, inputs: Inputs) -> Outputs:
        threading.Event().wait(0.05)
        return {"doubled": inputs["number"] * 2}
