"""NNCF's models in an unedited recipe, beside a plan of ours."""

import json

import pytest

BLOCK = """
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2, enc, ctc_lin]
    calibration: {num_utterances: 4}
    output_folder: !ref <output_folder>/quantized
    variants:
        - {name: nncf, method: nncf}
        - name: control
          method: nncf_accuracy_control
          search: {num_utterances: 3}
          nncf: {max_drop: 100}
        - {name: max, method: max}
"""
ONE_SET = ("--test_sets", "[clean]")


@pytest.mark.slow
def test_rival_beside_a_plan(trained):
    output = trained.root / "rivals"
    finished = trained.run(output, *ONE_SET, block=BLOCK)
    assert finished.code == 0, finished.out + finished.err
    written = output / "quantized"
    rows = json.loads((written / "comparison.json").read_text("utf-8"))["rows"]
    assert [(row["variant"], row["set"]) for row in rows] == [
        ("nncf", "clean"),
        ("control", "clean"),
        ("max", "clean"),
    ]
    first, control, ours = rows
    assert first["float"] == ours["float"]
    assert first["method"] == "nncf"
    assert first["backend"] == ours["backend"] == "openvino"
    assert sum(first["operations"].values()) > 10
    folder = written / "nncf"
    sizes = [(folder / f"model.{end}").stat().st_size for end in ("xml", "bin")]
    assert first["size_mb"] == sum(sizes) / 1e6
    assert first["rtf"]["quantized"] > 0
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["files"] == {"OpenVINO model": "model.xml"}
    assert any("No inference folder" in text for text in report["warnings"])
    # A drop that is allowed: nothing was made float again.
    assert control["operations"] == first["operations"]
    report = json.loads((written / "control/report.json").read_text("utf-8"))
    search = report["search"]
    assert search["reached"] and search["num_utterances"] == 3
    # Of the float model, of the quantized one, and once more at the end.
    assert search["evaluations"] == 3
    assert not (folder / "plan.json").exists()
    assert not (folder / "hyperparams.yaml").exists()
    # Started once more, it makes and evaluates nothing again.
    kept = {
        path.name: path.stat().st_mtime_ns
        for path in folder.iterdir()
        if path.suffix == ".bin" or path.stem.startswith("transcripts")
    }
    assert len(kept) == 2
    again = trained.run(output, *ONE_SET, block=BLOCK)
    assert again.code == 0, again.out + again.err
    assert kept == {n: (folder / n).stat().st_mtime_ns for n in kept}
    second = json.loads((written / "comparison.json").read_text("utf-8"))
    assert second["rows"][0]["quantized"] == first["quantized"]
