"""Rank-aware logging.

Modules only get a logger: those of the package by logging.getLogger(__name__), which lies below "dft", the files of
the top level by `get_logger`. Handlers are installed once, by `setup_logging` in main; the rank is read when a record
is emitted, so it is right however late the process group starts.
"""

import logging
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from dft.errors import UserError
from dft.files import warn_of_loss
from dft.printable import printable
from dft.program import rank_and_world_size

ROOT_NAME = "dft"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module outside the package: a child of the package's logger."""
    return logging.getLogger(f"{ROOT_NAME}.{name}")


class RankFilter(logging.Filter):
    """Adds the rank to every record; with `only_rank_0`, ranks above 0 let only errors pass."""

    def __init__(self, only_rank_0: bool):
        super().__init__()
        self.only_rank_0 = only_rank_0

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank, record.world_size = rank_and_world_size()
        return record.rank == 0 or record.levelno >= logging.ERROR or not self.only_rank_0


class PrintableFormatter(logging.Formatter):
    """Escapes what comes from outside in a record, and indents its further lines, so that none looks like a record."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True).replace("\n", "\n    ")


class LogFileHandler(logging.FileHandler):
    """Writes records to a file; once it can't be written, a warning says so, and the run goes on without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging where a record couldn't be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger(ROOT_NAME).removeHandler(self)
        with suppress(OSError):  # of what it holds unwritten
            self.close()
        warn_of_loss(Path(self.baseFilename), error.strerror or str(error))


def setup_logging(log_file: str | Path | None = None, only_rank_0: bool = True, debug: bool = False) -> None:
    """Installs the handlers: records go to stderr, and those of rank 0 also to `log_file`. Call it once, in main.

    Args:
        log_file: appended to, by rank 0 alone; its directory is made. None for no file.
        only_rank_0: other ranks log errors alone; False lets every rank log at info level.
        debug: show debug records too.

    Raises:
        UserError: the log file can't be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_file is not None and rank_and_world_size()[0] == 0:
        try:
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(LogFileHandler(log_file, encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"the log file {log_file} can't be written ({error}): give another --logging_dir"
            ) from error
    logger = logging.getLogger(ROOT_NAME)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.addFilter(RankFilter(only_rank_0))
        handler.setFormatter(
            PrintableFormatter("%(asctime)s - [RANK %(rank)s/%(world_size)s] - %(levelname)s - %(message)s")
        )
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False


def quiet_libraries(progress_bars: bool) -> None:
    """Silences messages of libraries that no user can act on; on ranks above 0 all warnings and progress bars."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # which is the right one
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # PEFT asks by this name
    if rank_and_world_size()[0] > 0:
        warnings.filterwarnings("ignore")
    if not progress_bars or rank_and_world_size()[0] > 0:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
