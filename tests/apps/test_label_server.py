"""The Label app in the real MONAI Label server, over HTTP on the loopback."""

from __future__ import annotations

import email
import email.policy
import gzip
import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from app_cases import EXPERTS, clean_environ, tool_environment, write_picture, write_volume
from PIL import Image

from lorkd_monai.apps import write_label_app
from lorkd_monai.apps.deploy.runtime.shared_weights import ExpertPool

pytestmark = pytest.mark.slow


class Server:
    """A client of the running server."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"

    def call(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json", **query: str):
        """Return the content type and the body of the answer."""
        url = f"{self.root}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        request = urllib.request.Request(url, data=body, method=method, headers={"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.headers["Content-Type"], answer.read()

    def infer(self, model: str, image: str, output: str):
        return self.call("POST", f"/infer/{model}", b"", image=image, output=output)

    def mask(self, model: str, image: str, suffix: str) -> tuple[np.ndarray, np.ndarray | None]:
        return read_mask(self.infer(model, image, "image")[1], suffix)

    def put_label(self, image: str, path: Path) -> None:
        border = uuid.uuid4().hex
        head = f'--{border}\r\nContent-Disposition: form-data; name="label"; filename="{path.name}"\r\n\r\n'
        body = head.encode() + path.read_bytes() + f"\r\n--{border}--\r\n".encode()
        self.call("PUT", "/datastore/label", body, f"multipart/form-data; boundary={border}", image=image, tag="final")


def read_mask(content: bytes, suffix: str) -> tuple[np.ndarray, np.ndarray | None]:
    if suffix == ".png":
        return np.asarray(Image.open(io.BytesIO(content))), None
    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    return np.asarray(image.dataobj), image.affine


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for i in range(3):
        write_volume(folder / f"volume{i}.nii.gz", seed=i)
        write_picture(folder / f"picture{i}.png", seed=i, colour=True)
    return folder


@pytest.fixture(scope="module")
def label_python(repository: Path) -> Path:
    return tool_environment(repository, "label") / "bin" / "python"


def _activated(python: Path) -> dict[str, str]:
    """The `monailabel` command runs the first `python` of the path."""
    return clean_environ(PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def server(label_python: Path, experts: Path, studies: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("label")
    app = write_label_app(folder / "app", [experts])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [label_python.with_name("monailabel"), "start_server", "--app", app, "--studies", studies]
    # Whatever would ask the internet fails at once: the server must not need it.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**_activated(label_python), **nowhere, "no_proxy": "127.0.0.1"}
    log = folder / "server.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=sink, stderr=subprocess.STDOUT, cwd=folder, env=environment,
        )  # fmt: skip
    client, started = Server(port), time.monotonic()
    try:
        while True:
            try:
                client.call("GET", "/info/")
                break
            except (urllib.error.URLError, ConnectionError) as error:
                if process.poll() is not None or time.monotonic() - started > 400:
                    raise AssertionError(f"no server: {error}\n{log.read_text()[-4000:]}") from error
                time.sleep(0.5)
        print(f"the server answered after {time.monotonic() - started:.0f} s")
        yield client
    finally:
        process.terminate()
        process.wait(timeout=30)
        print(log.read_text()[-6000:])


def test_info_names_every_expert_with_the_data_lists_own_class_names(server: Server) -> None:
    info = json.loads(server.call("GET", "/info/")[1])

    assert set(info["models"]) == {f"{name}_{spec[0]}" for name, spec in EXPERTS.items()}
    assert info["models"]["tumor_segmentation"]["labels"] == {"tumor": 1, "$edema/é": 2}
    assert info["models"]["lung_classification"]["labels"] == {"background": 0, "$(touch x) sick": 1, "Ödem": 2}
    assert info["models"]["nodule_classification"]["type"] == "classification"
    assert set(info["trainers"]) == {"tumor_segmentation", "vessel_segmentation", "skin_segmentation"}


def _own_mask(experts: Path, name: str, image: Path) -> np.ndarray:
    """What the bundle says of an image by itself."""
    with ExpertPool(experts, device="cpu").use(name) as (expert, network):
        return expert.predict(network, expert.load(image)).numpy()


def test_all_output_forms_give_the_mask_of_the_bundle_on_the_images_own_grid(
    server: Server, experts: Path, studies: Path
) -> None:
    mask, affine = server.mask("tumor_segmentation", "volume0", ".nii.gz")
    own = nib.load(studies / "volume0.nii.gz")
    assert mask.shape == own.shape and len(np.unique(mask)) > 1
    np.testing.assert_allclose(affine, own.affine, atol=1e-5)
    expected = _own_mask(experts, "tumor_segmentation", studies / "volume0.nii.gz")
    np.testing.assert_array_equal(mask, expected)

    kind, body = server.infer("tumor_segmentation", "volume0", "json")
    assert kind.startswith("application/json") and "tumor" in json.loads(body)["label_names"]

    kind, body = server.infer("tumor_segmentation", "volume0", "all")
    parts = email.message_from_bytes(
        f"Content-Type: {kind}\n\n".encode() + body, policy=email.policy.HTTP
    ).get_payload()
    found = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts}
    assert set(found) == {"params", "image"} and json.loads(found["params"])["label_names"]
    np.testing.assert_array_equal(read_mask(found["image"], ".nii.gz")[0], expected)


def test_a_2d_mask_has_the_rows_and_columns_of_the_picture(server: Server, experts: Path, studies: Path) -> None:
    mask, _ = server.mask("skin_segmentation", "picture0", ".png")
    expected = _own_mask(experts, "skin_segmentation", studies / "picture0.png")
    assert mask.shape == (40, 50) and len(np.unique(mask)) > 1
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("model", "image"), [("lung_classification", "picture1"), ("nodule_classification", "volume1")]
)
def test_a_classification_gives_every_class_its_probability(server: Server, model: str, image: str) -> None:
    answers = [json.loads(server.infer(model, image, output)[1]) for output in ("json", "all")]
    assert answers[0]["prediction"] == answers[1]["prediction"]
    scores = {item["label"]: item["score"] for item in answers[0]["prediction"]}
    assert list(scores) == EXPERTS[model.split("_")[0]][5]
    assert abs(sum(scores.values()) - 1) < 1e-4


def test_labels_train_an_expert_further_and_inference_uses_the_new_weights(
    server: Server, studies: Path, tmp_path: Path
) -> None:
    name, settings = "vessel_segmentation", {"max_epochs": 1, "multi_gpu": False, "val_split": 0.34}
    with pytest.raises(urllib.error.HTTPError) as refused:  # no label is there yet
        server.call("POST", f"/train/{name}", json.dumps(settings).encode(), run_sync="true")
    assert refused.value.code >= 400

    before = json.loads(server.infer("tumor_segmentation", "volume0", "json")[1])
    probe = server.mask(name, "volume0", ".nii.gz")[0]
    for i in range(3):
        image = nib.load(studies / f"volume{i}.nii.gz")
        label = nib.Nifti1Image((np.asarray(image.dataobj) > 100).astype(np.uint8), image.affine)
        nib.save(label, tmp_path / f"label{i}.nii.gz")
        server.put_label(f"volume{i}", tmp_path / f"label{i}.nii.gz")
    stored = json.loads(server.call("GET", "/datastore/", output="train")[1])
    assert len(stored) == 3

    server.call("POST", f"/train/{name}", json.dumps(settings).encode(), run_sync="true")
    assert (server.mask(name, "volume0", ".nii.gz")[0] != probe).any()
    # The other experts are as they were.
    assert json.loads(server.infer("tumor_segmentation", "volume0", "json")[1])["label_names"] == before["label_names"]


def test_an_unknown_expert_is_refused_by_name(label_python: Path, experts: Path, studies: Path, tmp_path: Path) -> None:
    app = write_label_app(tmp_path / "app", [experts / "lung_classification"])
    command = [label_python.with_name("monailabel"), "start_server", "--app", app, "--studies", studies]
    done = subprocess.run(
        [*map(str, command), "--host", "127.0.0.1", "--port", "1", "--conf", "models", "spleen_segmentation"],
        capture_output=True, text=True, timeout=400, cwd=tmp_path, check=False, env=_activated(label_python),
    )  # fmt: skip
    assert "there is no expert spleen_segmentation; model/ holds lung_classification" in done.stdout + done.stderr
