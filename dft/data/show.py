"""Write and log what became of the data."""

import logging
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dft.config.data import DataConfig
from dft.data.page import write_page
from dft.data.prepared import PreparedData
from dft.data.report import report_table, report_warnings, show_row, write_report
from dft.files import dispensable
from dft.printable import printable

logger = logging.getLogger(__name__)


def show_data(data: PreparedData, config: DataConfig, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> None:
    """Writes data_report.json, data_report.html and rejected.jsonl, and logs the table of the files.

    A dry run also prints a sample row of each file; with debug_data_processing they and all dropped rows are logged.
    """
    out = Path(output_dir)
    rejected = data.directory / "rejected.jsonl"
    with dispensable(out / "data_report.json"):
        write_report(data.report, out)
    with dispensable(out / "rejected.jsonl"):
        shutil.copyfile(rejected, out / "rejected.jsonl")
    with dispensable(out / "data_report.html"):
        write_page(data, tokenizer, out / "data_report.html")
    logger.info("Data: %d training and %d evaluation rows", len(data.train), data.num_evaluation)
    if data.channels:
        logger.info("Sources with metrics of their own: %s", ", ".join(data.channels))
    for line in report_table(data.report).splitlines():
        logger.info(line)
    for warning in report_warnings(data.report):
        logger.warning(warning)
    for row in data.samples:
        if config.dry_run:
            print(show_row(row, tokenizer), end="\n\n")
        elif config.debug_data_processing:
            logger.debug("sample row %r", show_row(row, tokenizer, color=False))
    if config.dry_run:
        print(f"the rows as a page: {printable(out / 'data_report.html')}")
        print(f"dropped rows:       {printable(out / 'rejected.jsonl')}")
    if config.debug_data_processing:
        with open(rejected, encoding="utf-8") as file:
            for line in file:
                logger.debug("dropped %s", line.rstrip("\n"))
