import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "package"))
from test_report import bench


def test_a_result_shows_itself_in_a_notebook():
    result = bench(base=1.0, other=2.0)
    text = result._repr_html_()
    assert "<th>p50 ms [95 %]</th>" in text
    assert "baseline" in text
    assert "slower" in text
    assert result.environment.cpu_model in text
    for warning in result.warnings():
        assert warning.split(":")[0] in text


def test_names_are_text():
    result = bench(base=1.0)
    evil = result.measurements[0].model_copy(update={"name": "<script>"})
    text = result.model_copy(update={"measurements": (evil,), "baseline": None})._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
