"""Make a checkpoint that any number of processes, and another stage of ZeRO, can go on from.

    python scripts/reshape_checkpoint.py outputs/run/checkpoint-300
    python scripts/reshape_checkpoint.py outputs/run/checkpoint-300 --output /disk/checkpoint-300

DeepSpeed's ZeRO-1, 2 and 3 save a part for each process, which only as many processes under the same stage can load.
This writes a checkpoint beside it that holds each parameter whole; the given one stays as it is. It needs no GPU, as
much room on the disk as the checkpoint, and memory for the largest parameter. What is written is whole or absent.

The run that goes on must train the same rows in a step: per_device_train_batch_size × gradient_accumulation_steps ×
processes stays what it was. Its own checkpoints are again of its own number of processes.
"""

import argparse

from dft.files import path_argument
from dft.printable import printable
from dft.program import program


def main(argv: list[str] | None = None) -> None:
    """Writes the checkpoint, and says how a run goes on from it.

    Raises:
        UserError: there is nothing that can be reshaped, or the output can't be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=path_argument, help="directory of a checkpoint that DeepSpeed has saved")
    parser.add_argument(
        "--output", type=path_argument, help="a directory that doesn't exist; by default CHECKPOINT-reshaped"
    )
    args = parser.parse_args(argv)
    from dft.checkpoints.reshape import reshape  # not at the top: torch takes seconds, and --help needs none

    checkpoint = args.checkpoint.absolute()
    output = args.output or checkpoint.with_name(f"{checkpoint.name}-reshaped")
    rows_per_step = reshape(checkpoint, output)
    rows = "as many rows as before" if rows_per_step is None else f"{rows_per_step} rows"
    print(
        f"{printable(output)} can be loaded by any number of processes, under ZeRO-1, 2 or 3. Go on with the flags of "
        f"the run and\n    --resume_from_checkpoint {printable(output)}\nA step must train {rows}: "
        "--per_device_train_batch_size × --gradient_accumulation_steps × processes."
    )


if __name__ == "__main__":
    with program():
        main()
