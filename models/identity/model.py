"""Answers with what it was sent."""

from tensorway.model import Inputs, Model, Outputs


class Identity(Model):
    """`output` lies on the very bytes of `input`: nothing is copied."""

    def forward(self, inputs: Inputs) -> Outputs:
        return {"output": inputs["input"]}
