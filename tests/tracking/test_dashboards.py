"""What a person sees: SwanLab's page of one machine and TensorBoard, in a browser, with the numbers of the run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Locator, Page, Response, expect, sync_playwright

from tests.helpers import run

pytestmark = pytest.mark.launch

NAME = "first-try"
TAGS = {  # what a chart is called: key of the trainer's log
    "train/loss": "loss",
    "train/ce_loss": "ce_loss",
    "train/train/avg_p_correct": "train/avg_p_correct",
    "eval/ce_loss": "eval_ce_loss",
}
STEPS = os.environ.get("DASHBOARD_STEPS", "6")  # the pictures of the documents show 40
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a directory: pictures of the pages are saved there
SECONDS = 300  # for what a dashboard does in 20 at most, on two cores
expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, without a window; nothing is downloaded."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        advice = "no Chromium: on Debian, apt-get install --no-install-recommends chromium"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(advice)
        pytest.skip(advice)
    with sync_playwright() as playwright:
        # root has no sandbox, and containers have a small /dev/shm
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1400, "height": 1060}, locale="en-US")
    page.set_default_timeout(SECONDS * 1000)
    yield page
    page.close()


@pytest.fixture(scope="module")
def output_dir(browser, tiny_model, chat_file, tmp_path_factory) -> Path:
    """What a short run leaves."""
    directory = tmp_path_factory.mktemp("dashboards")
    flags = [
        *("--model_name_or_path", tiny_model, "--data_files", chat_file, "--output_dir", directory / "out"),
        *("--torch_dtype", "float32", "--per_device_train_batch_size", 2, "--learning_rate", 1e-2, "--dft_alpha", 0.5),
        *("--max_steps", STEPS, "--logging_steps", 1, "--eval_steps", 2, "--save_strategy", "no"),
        *("--report_to", "swanlab", "tensorboard", "--project", "trial", "--run_name", NAME),
    ]
    variables = {"LAUNCHER": "python", "SWANLAB_MODE": "local", "LOG_DIR": str(directory)}
    result = run(["bash", "scripts/train.sh", *flags], **variables)
    assert result.returncode == 0, result.stdout[-6000:]
    return directory / "out"


@pytest.fixture(scope="module")
def last(output_dir) -> dict[str, tuple[int, float]]:
    """The last step and value of each chart, in the trainer's own record."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {tag: [(r["step"], r[key]) for r in history if key in r][-1] for tag, key in TAGS.items()}


def free_port() -> int:
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        return any_free.getsockname()[1]


@contextmanager
def served(log: Path, *command) -> Iterator[str]:
    """Starts a dashboard, and gives the address that it names once it answers there."""
    program = Path(sys.executable).with_name(command[0])
    with open(log, "w") as output:
        process = subprocess.Popen([program, *map(str, command[1:])], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SECONDS
        while not answers(address := re.search(r"http://([\w.]+):(\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield address[0]
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)


def answers(address: re.Match | None) -> bool:
    with socket.socket() as client:
        return address is not None and client.connect_ex((address[1], int(address[2]))) == 0


def wait_until_read(page: Page, address: str, tag: str, step: int) -> None:
    """Until TensorBoard, which answers before it has read the run, knows a chart up to a step.

    Its page asks for the runs once, when it is opened.
    """
    deadline = time.monotonic() + SECONDS
    while True:
        answer = page.request.get(f"{address}/data/plugin/scalars/scalars", params={"run": NAME, "tag": tag})
        if answer.ok and answer.json()[-1][1] == step:
            return
        assert time.monotonic() < deadline, answer.text()
        time.sleep(0.1)


def show(page: Page, name: str, first: Locator) -> None:
    """Saves a picture, if one is wanted, once the charts are drawn."""
    if SCREENSHOTS:
        first.scroll_into_view_if_needed()
        page.mouse.move(0, 0)
        page.wait_for_timeout(2000)  # the charts are drawn with an animation
        page.screenshot(path=Path(SCREENSHOTS) / name)


def watch(page: Page) -> list[Response]:
    """What the page gets from its server, from now on."""
    fetched: list[Response] = []
    page.on("response", lambda response: fetched.append(response))
    return fetched


def test_swanlab_of_one_machine_shows_the_last_values(output_dir, last, page, tmp_path):
    fetched = watch(page)
    command = ("swanlab", "watch", output_dir / "swanlog", "-p", free_port())
    with served(tmp_path / "swanlab.log", *command) as address:
        page.goto(address)
        page.get_by_text(NAME, exact=True).first.click()
        for tag, (step, value) in last.items():
            chart = page.locator("section.chart-container").filter(has=page.get_by_text(tag, exact=True))
            canvas = chart.locator("canvas")
            canvas.scroll_into_view_if_needed()
            curve = next(r.json() for r in fetched if r.url.endswith(f"/tag/{tag}"))["data"]["list"]
            assert (curve[-1]["index"], curve[-1]["data"]) == (step, pytest.approx(value))
            # where the curve ends, the mouse shows the number, cut after four digits
            canvas.hover(position={"x": canvas.bounding_box()["width"] - 9, "y": 100})
            expect(chart.locator(".lc-tooltip-step")).to_have_text(str(step))
            assert float(chart.locator(".lc-tooltip-value").inner_text()) == pytest.approx(value, rel=1e-3)
        page.get_by_text("Experiment Card").click()
        expect(page.get_by_text('"dft_alpha": 0.5')).to_be_visible()
        page.get_by_text("Chart", exact=True).click()
        show(page, "swanlab_local.png", page.locator("section.chart-container").first)


def test_tensorboard_shows_the_last_values(output_dir, last, page, tmp_path):
    fetched = watch(page)
    with served(tmp_path / "board.log", "tensorboard", "--logdir", output_dir / "runs", "--port", 0) as address:
        for tag, (step, _) in last.items():
            wait_until_read(page, address, tag, step)
        page.goto(f"{address}/?tagFilter={quote('^(' + '|'.join(last) + ')$')}#timeseries")
        expect(page.locator("runs-data-table").get_by_text(NAME, exact=True)).to_be_visible()
        for tag, (step, value) in last.items():
            card = page.locator("scalar-card").filter(has=page.get_by_title(tag, exact=True))
            card.scroll_into_view_if_needed()
            expect(card.locator("line-chart")).to_be_visible()
            row = card.locator("tb-data-table-content-row")
            expect(row).to_contain_text(NAME)
            name, _, shown, at, *_ = row.inner_text().split()  # run, smoothed, value, step, relative time
            assert (name, int(at), float(shown)) == (NAME, step, pytest.approx(value, rel=1e-3, abs=6e-5))
            posts = [r for r in fetched if r.url.endswith("/timeSeries") and f'"{tag}"' in r.request.post_data]
            curve = posts[0].json()[0]["runToSeries"][NAME]
            assert (curve[-1]["step"], curve[-1]["value"]) == (step, pytest.approx(value))
        show(page, "tensorboard.png", page.locator("scalar-card").first)
