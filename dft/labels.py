"""The label that excludes a token from the loss, as in torch.nn.functional.cross_entropy."""

IGNORE_INDEX = -100
