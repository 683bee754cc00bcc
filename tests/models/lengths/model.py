"""Shows its padding in `total` (7 for every added token), and multiplies `weights` by `tokens` in `scaled`."""

from tensorway.model import Inputs, Model, Outputs


class Lengths(Model):
    def forward(self, inputs: Inputs) -> Outputs:
        tokens, weights = inputs["tokens"], inputs["weights"]
        return {"scaled": weights * tokens.unsqueeze(-1), "total": tokens.sum(dim=1)}
