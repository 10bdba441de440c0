"""Numbers that several rooms share."""

IGNORE_INDEX = -100  # the label of a token without loss, as in torch.nn.functional.cross_entropy
PADDED_TO = 8  # padded rows are as long as a multiple of so many tokens, which suits the GPUs' matrix units
REFERENCE_COLUMN = "reference_log_p"  # of rows: log p of each token by the weights that a training begins with
