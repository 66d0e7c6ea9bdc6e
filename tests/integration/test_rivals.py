"""NNCF's models in an unedited recipe, beside a plan of ours."""

import json

BLOCK = """
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2, enc, ctc_lin]
    calibration: {num_utterances: 4}
    output_folder: !ref <output_folder>/quantized
    variants:
        - {name: nncf, method: nncf}
        - {name: max, method: max}
"""


def test_rival_beside_a_plan(trained):
    output = trained.root / "rivals"
    finished = trained.run(output, block=BLOCK)
    assert finished.code == 0, finished.out + finished.err
    written = output / "quantized"
    rows = json.loads((written / "comparison.json").read_text("utf-8"))["rows"]
    assert [(row["variant"], row["set"]) for row in rows] == [
        ("nncf", "clean"),
        ("nncf", "noisy"),
        ("max", "clean"),
        ("max", "noisy"),
    ]
    first, _, ours, _ = rows
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
    assert not (folder / "plan.json").exists()
    assert not (folder / "hyperparams.yaml").exists()
    # Started once more, it makes and evaluates nothing again.
    kept = {
        path.name: path.stat().st_mtime_ns
        for path in folder.iterdir()
        if path.suffix == ".bin" or path.stem.startswith("transcripts")
    }
    assert len(kept) == 3
    again = trained.run(output, block=BLOCK)
    assert again.code == 0, again.out + again.err
    assert kept == {n: (folder / n).stat().st_mtime_ns for n in kept}
    second = json.loads((written / "comparison.json").read_text("utf-8"))
    assert second["rows"][0]["quantized"] == first["quantized"]
