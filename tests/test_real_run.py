"""tests/tools/real_run.py: its panels. Nothing is trained; the rows of its noise are tested where they are used."""

import argparse

import pytest
import real_run


@pytest.mark.parametrize(
    "panel, rows, rate, epochs",
    [
        ("clean", "clean", 1e-3, 3),
        ("same", "same", 1e-3, 3),
        ("same-light", "same", 5e-4, 1),
    ],
)
def test_how_each_panel_trains_its_reference(panel, rows, rate, epochs, monkeypatch, tmp_path):
    """The paper's reference is trained like everything else; only the first panel has what needs no reference."""
    seen = []
    monkeypatch.setattr(real_run.forgetting, "run", lambda options: seen.append(options) or {})
    monkeypatch.setattr(real_run.forgetting, "report", lambda *_: None)
    monkeypatch.setattr(real_run.demo, "oracle", lambda *_, **__: {})
    own = argparse.Namespace(model="m", out=tmp_path)
    folder = real_run.run_split(own, ["--device", "cpu"], 4, panel)
    (options,) = seen
    assert folder == tmp_path / "split-4" / panel and options.out == str(folder)
    assert options.reference_data == [str(tmp_path / "split-4" / f"reference-{rows}.jsonl")]
    assert (options.reference_lr, options.reference_epochs) == (rate, epochs)
    again = ["reference", "ignoring", "forgetting", "forgetting-wga"]
    assert options.methods == (real_run.METHODS if panel == "clean" else again)
