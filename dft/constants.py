"""Numbers that several rooms share."""

IGNORE_INDEX = -100  # the label of a token without loss, as in torch.nn.functional.cross_entropy
PADDED_TO = 8  # padded rows are as long as a multiple of so many tokens, which suits the GPUs' matrix units
