"""benchmarks/arm.py: the page, and when its bar is met."""

import pytest


@pytest.fixture(scope="module")
def arm(script):
    return script("arm")


def core(name, minsn, **changes):
    item = {
        "core": name, "ok": True, "refused": "", "agreement": 1.0, "multiplies": ["dot product (sdot, udot)"],
        "distances": [{"max_lsb": 0.0}], "cost": {"minsn": minsn},
    }  # fmt: skip
    return item | changes


def row(precision="int8", cores=(), **changes):
    found = {"model": "lite0", "real": True, "vectors": False, "target": "arm64-xnnpack", "precision": precision, "problem": ""}
    found |= {"cores": list(cores)}
    return found | {"bytes": 5e6, "emulator": "qemu 7.2.22", "differences": ["none"] * len(found["cores"])} | changes


def test_costs_stand_side_by_side_and_never_as_times(arm):
    rows = [row(cores=[core("cortex-a53", 160.0), core("cortex-a76", 64.0)]), row("float", [core("cortex-a76", 192.0)])]
    page = arm.markdown({"rows": rows, "missed": arm.missed(rows)}, "this machine")
    assert "| network | target | cortex-a53 | cortex-a76 |" in page
    assert "| lite0 | arm64-xnnpack | 160.0 | 64.0 / 192.0 = 3.00 |" in page
    assert "| lite0 | arm64-xnnpack | int8 | 5.00 | ok, none, 100 % | ok, none, 100 % | – | dot product (sdot, udot) |" in page
    assert "`measured: false`" in page
    assert " ms" not in page
    assert "The bar is met." in page


def test_float_answers_of_an_integer_bundle_are_equal_or_as_near_as_another_rounding(arm):
    off, same = ([{"max_lsb": None, "max_abs": value}] for value in (0.0087, 0.0))
    cores = [core("cortex-a53", 1.0, distances=off), core("cortex-a72", 1.0, distances=same)]
    where = "lite0, arm64-xnnpack, int8, cortex-a53: float outputs, 0.0087 from this machine's"
    assert arm.missed([row(cores=cores)]) == [where]
    assert arm.missed([row(cores=cores, nudged=0.002)]) == [f"{where}, where another rounding of the weights moves them by 0.002"]
    near = row(cores=cores, nudged=0.003)
    assert arm.missed([near]) == []
    assert "| 0.003 |" in arm.markdown({"rows": [near], "missed": []}, "this machine")


def test_a_vector_is_near_and_no_class(arm):
    vector = row(cores=[core("cortex-a53", 1.0, agreement=0.5, cosine=0.9987)], vectors=True)
    page = arm.markdown({"rows": [vector], "missed": []}, "this machine")
    assert "ok, none, cos 0.9987 |" in page
    assert "50 %" not in page


def test_what_does_not_meet_the_bar_is_named(arm):
    rows = [
        row(cores=[core("cortex-a53", None, ok=False, refused="the bundle needs x\n  fix: y", distances=[]), core("cortex-a76", 1.0)]),
        row("float", [core("cortex-a76", 1.0, distances=[{"max_lsb": None}])]),
        row(target="arm64-qnnpack", cores=[core("cortex-a76", 1.0, distances=[{"max_lsb": 2.0}])]),
        row(target="arm64-onnxruntime", problem="no kernel for Foo"),
    ]
    assert arm.missed(rows) == [
        "lite0, arm64-xnnpack, int8, cortex-a53: the bundle needs x",
        "lite0, arm64-qnnpack, int8, cortex-a76: 2 steps of the output's scale from this machine's answers",
        "lite0, arm64-onnxruntime, int8: no kernel for Foo",
    ]
    page = arm.markdown({"rows": rows, "missed": arm.missed(rows)}, "this machine")
    assert "FAILED" in page
    assert "The bar is missed:" in page


def test_without_qemu_nothing_is_claimed(arm, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(arm.root, "missing", lambda: "there is no qemu")
    monkeypatch.setattr(arm.sys, "argv", ["arm.py", str(tmp_path)])
    assert arm.main() == 2
    assert "there is no qemu" in capsys.readouterr().err
