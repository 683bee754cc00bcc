"""Orders: 1 refuse in preprocess, 2 refuse in forward, 3 raise in forward, 4 run out of memory, 5 refuse in postprocess, 6 raise in
preprocess, 7 another dtype, 8 raise in postprocess, 9 too few rows, 10 parameters too; anything else is answered with its negative."""

import torch

from tensorway.model import Inputs, InvalidInput, Model, Outputs, Parameters


class Faulty(Model):
    def __init__(self) -> None:
        self.num_steps = 0

    def preprocess(self, inputs: Inputs, parameters: Parameters) -> Inputs:
        if (inputs["order"] == 1).any():
            raise InvalidInput("order 1 is refused", field="inputs.order")
        if (inputs["order"] == 6).any():
            raise ZeroDivisionError("order 6 divides by zero")
        return {"order": inputs["order"], "shift": torch.full_like(inputs["order"], int(parameters.get("shift", 0)))}

    def forward(self, inputs: Inputs) -> Outputs:
        self.num_steps += 1
        order = inputs["order"]
        if (order == 2).any():
            raise InvalidInput("order 2 is refused late")
        if (order == 3).any():
            raise KeyError("order 3")
        if (order == 4).any():
            torch.empty(1 << 60)
        if (order == 7).any():
            return {"result": order.to(torch.int32)}
        if (order == 9).any():
            return {"result": -order[1:]}
        result = -order + inputs["shift"]
        order.fill_(99)
        return {"result": result}

    def postprocess(self, outputs: Outputs, parameters: Parameters) -> Outputs:
        if (outputs["result"] == -5).any():
            raise InvalidInput("order 5 is refused at the end")
        if (outputs["result"] == -8).any():
            raise RuntimeError("order 8")
        if (outputs["result"] == -10).any():
            return {**outputs, "note": "ten", "is_ten": True, "count": 10, "share": 0.5}
        return outputs
