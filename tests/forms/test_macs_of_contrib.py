"""MACs of operators of com.microsoft, of sub-graphs, and where an axis is only named."""

import onnx_ir as ir
import pytest

from deploycc.forms._macs import count_macs, is_heavy, macs_by_operator

HEAD = '<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]> g ('
NBITS = "com.microsoft.MatMulNBits <K = 70, N = 5, bits = 4, block_size = 32> (x, b, s)"
LSTM = "com.microsoft.DynamicQuantizeLSTM <hidden_size = 4> (x, w, r, , , , , , ws, wz, rs, rz)"
IF = """float[2,7] x, float[7,5] w, bool f) => (float[2,5] y) { y = If (f)
    <then_branch = t () => (float[2,5] a) { a = MatMul (x, w) },
     else_branch = e () => (float[2,5] b) { c = MatMul (x, w) d = MatMul (x, w) b = Add (c, d) }>"""
LSTM_INPUTS = "float[9,2,3] x, int8[1,3,16] w, int8[1,4,16] r, float[1,16] ws, int8[1,16] wz, float[1,16] rs, int8[1,16] rz"


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        (f"float[2,3,70] x, uint8[5,3,16] b, float[5,3] s) => (float[2,3,5] y) {{ y = {NBITS}", 2 * 3 * 70 * 5),
        (f"float[N,70] x, uint8[5,3,16] b, float[5,3] s) => (float[N,5] y) {{ y = {NBITS}", 70 * 5),
        (f"{LSTM_INPUTS}) => (float[9,1,2,4] y) {{ y = {LSTM}", 9 * 2 * 16 * 7),
        (
            "uint8[50,8] t, int64[4] i, float[50,1] s) => (float[4,16] y) { y = com.microsoft.GatherBlockQuantized <block_size = 16> (t, i, s)",
            0,
        ),
        ("float[2,K] x, float[7,5] w) => (float[2,5] y) { y = MatMul (x, w)", 2 * 7 * 5),
        ("float[2,K] x, float[5,7] w) => (float[2,5] y) { y = Gemm <transB = 1> (x, w)", 2 * 7 * 5),
        ("float[2,K] x, float[K,5] w) => (float[2,5] y) { y = MatMul (x, w)", 2 * 5),
        (
            IF,
            2 * (2 * 7 * 5),  # the branch with more of them
        ),
    ],
)
def test_macs_by_hand(text: str, macs: int):
    counts = count_macs(ir.from_onnx_text(f"{HEAD}{text} }}"))
    assert counts is not None
    assert sum(counts.values()) == macs


def test_by_operator():
    model = ir.from_onnx_text(
        f"{HEAD}float[2,3] x, float[3,3] w) => (float[2,3] y) {{ a = MatMul (x, w) b = MatMul (a, w) y = Gemm (b, w) }}"
    )
    assert macs_by_operator(model) == {"MatMul": 36, "Gemm": 18}


@pytest.mark.parametrize("text", ["t = MatMul (s, w)", "t = Tanh (s)"])
def test_how_often_a_loop_runs_is_not_known(text: str):
    body = f"""int64 n, bool go, float[2,3] x, float[3,3] w) => (float[2,3] y) {{ y = Loop (n, go, x)
        <body = b (int64 i, bool on, float[2,3] s) => (bool more, float[2,3] t) {{ more = Identity (on) {text} }}>"""
    model = ir.from_onnx_text(f"{HEAD}{body} }}")
    assert count_macs(model) == (None if "MatMul" in text else {})
    assert macs_by_operator(model) == (None if "MatMul" in text else {})


def test_a_table_is_not_heavy():
    assert is_heavy("MatMulNBits")
    assert not is_heavy("GatherBlockQuantized")
