"""The page of docs/deploy.md in headless Chromium, on a WAV of the demo."""

import functools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile

from speechbrain_stablequant import quantize_pretrained
from speechbrain_stablequant.export import export_for

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "ASR" / "CTC"
DEMO = RECIPE / "demo" / "LibriSpeech"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Tells the test what stands in the page.
REPORT = """<script>
const report = (text) => fetch("/", { method: "POST", body: text });
addEventListener("error", (x) => report(`error: ${x.message}`));
addEventListener("unhandledrejection", (x) => report(`error: ${x.reason}`));
const place = document.querySelector("#text");
new MutationObserver(() => report(place.textContent)).observe(
    place, { childList: true });
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.skipif(
        not shutil.which("node"), reason="node is not installed"
    ),
    pytest.mark.skipif(
        "TRANSFORMERS_JS" not in os.environ,
        reason="TRANSFORMERS_JS names no folder with Node's package "
        "@huggingface/transformers",
    ),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The demo's checkpoint for transformers.js, as the page names it."""
    pytest.importorskip("onnx", reason="needs the extra onnx")
    place = tmp_path_factory.mktemp("browser")
    command = [sys.executable, "make_hub_folder.py", str(place / "hub")]
    subprocess.run(command, cwd=RECIPE, check=True, capture_output=True)
    speech = next((DEMO / "dev-demo").iterdir())
    shutil.copytree(speech, place / "dev" / speech.name)
    few = {"num_utterances": 2}
    made = quantize_pretrained(
        str(place / "hub"),
        str(place / "dev"),
        str(place / "quantized"),
        method="max",
        calibration=few,
        search=few,
    )
    return export_for(made.model, place / "web", "transformers.js")


@pytest.fixture(scope="module")
def wave(exported):
    """Speech of the demo, beside the page."""
    source = sorted((DEMO / "test-demo").rglob("*.flac"))[0]
    wave, rate = soundfile.read(source, dtype="float32")
    path = exported.parent / "speech.wav"
    soundfile.write(path, wave, rate, "PCM_16")
    return soundfile.read(path, dtype="float32")[0]


class Page(SimpleHTTPRequestHandler):
    """Serves a folder, and takes what its page reports."""

    reports: "queue.Queue[str]" = queue.Queue()

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        self.reports.put(self.rfile.read(size).decode("utf-8"))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        """Quiet."""


def in_browser(folder: Path) -> str:
    """What the page of a folder shows in the end."""
    handler = functools.partial(Page, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
            # Nothing comes from another host.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={folder / 'profile'}",
            f"http://127.0.0.1:{server.server_port}/page.html",
        ]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as browser:
            try:
                return Page.reports.get(timeout=240)
            finally:
                browser.terminate()
                server.shutdown()


def in_node(folder: Path, wave) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = text.partition("```js\n")[2].partition("```")[0]
    code = code.replace('".."', json.dumps(str(folder.parent)))
    samples = f"const samples = new Float32Array({wave.tolist()});\n"
    script = Path(os.environ["TRANSFORMERS_JS"]) / "stablequant_page.mjs"
    script.write_text(f"{samples}{code}\nconsole.log(text);\n")
    try:
        done = subprocess.run(
            ["node", str(script)], capture_output=True, text=True, timeout=240
        )
    finally:
        script.unlink()
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_recognizes_as_node_does(exported, wave):
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (html,) = re.findall(r"^```html\n(.*?)^```$", page, re.M | re.S)
    place = exported.parent
    (place / "page.html").write_text(html + REPORT, encoding="utf-8")
    modules = Path(os.environ["TRANSFORMERS_JS"]) / "node_modules"
    (place / "node_modules").symlink_to(modules.resolve())
    shown = in_browser(place).strip()
    assert len(shown.split()) > 3
    assert shown == in_node(exported, wave).strip()
