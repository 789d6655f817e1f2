import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deploycc.errors import SourceError
from deploycc.sources.models._checks import refuse_non_finite, refuse_non_finite_state
from deploycc.sources.models._weights import load_state, read_state, seeded


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_files_load_into_the_module(tmp_path, name):
    trained, fresh = net(), net()
    path = tmp_path / name
    save_file(trained.state_dict(), path) if name.endswith("safetensors") else torch.save(trained.state_dict(), path)
    load_state(fresh, read_state(path), str(path))
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in trained.state_dict().items())


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrappers_of_training_scripts_are_opened(tmp_path, wrapper):
    torch.save({wrapper: net().state_dict(), "epoch": 3}, tmp_path / "w.pt")
    assert "0.weight" in read_state(tmp_path / "w.pt")


def test_the_prefix_of_data_parallel_is_taken_off(tmp_path):
    torch.save({f"module.{key}": value for key, value in net().state_dict().items()}, tmp_path / "w.pt")
    load_state(net(), read_state(tmp_path / "w.pt"), "w.pt")


def test_counters_and_tied_weights_may_be_missing():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2)
            self.b = self.a

    load_state(Tied(), {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}, "w")
    state = {key: value for key, value in net().state_dict().items() if "num_batches" not in key}
    load_state(net(), state, "w")


def test_keys_that_do_not_fit_are_named():
    state = dict(net().state_dict())
    state["0.weight"] = torch.zeros(4, 9)
    del state["0.bias"]
    state["head.bias"] = torch.zeros(1)
    with pytest.raises(SourceError) as caught:
        load_state(net(), state, "w.pt")
    assert "w.pt does not fit Sequential" in caught.value.what
    assert "missing: 0.bias" in caught.value.what
    assert "unexpected: head.bias" in caught.value.what
    assert "mis-shaped: 0.weight is [4, 9] in the file, [4, 3] in the model" in caught.value.what


def test_only_the_first_keys_are_listed():
    with pytest.raises(SourceError, match=r"unexpected: k0, k1, k2 and 7 more"):
        load_state(net(), {**net().state_dict(), **{f"k{index}": torch.zeros(1) for index in range(10)}}, "w.pt")


class Payload:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.pt", None, "there is no weights file"),
        ("w.h5", b"x", "not a weights file by its name"),
        ("w.pt", b"", "is empty"),
        ("w.pt", b"not a checkpoint", "holds more than tensors|damaged or not a PyTorch file"),
        ("w.pt", b"PK\x03\x04" + bytes(60), "damaged or not a PyTorch file"),
        ("w.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "not a readable safetensors file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=said):
        read_state(tmp_path / name)


def test_truncated_files(tmp_path):
    torch.save(net().state_dict(), tmp_path / "w.pt")
    save_file(net().state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(SourceError):
            read_state(tmp_path / name)


def test_a_pickle_is_never_run(tmp_path, capsys):
    torch.save({"w": Payload()}, tmp_path / "w.pt")
    with pytest.raises(SourceError, match="loading it would run code from it"):
        read_state(tmp_path / "w.pt")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(("content", "said"), [({"epoch": 3}, "keys epoch"), ({}, "an empty mapping"), ([torch.zeros(1)], "a list")])
def test_what_is_no_state_dict(tmp_path, content, said):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=f"holds no state dict .* but .*{said}"):
        read_state(tmp_path / "w.pt")


def test_seeded_repeats_and_leaves_no_trace():
    before = torch.random.get_rng_state()
    with seeded(5):
        first = torch.rand(3)
    with seeded(5):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("values", "mask", "said"),
    [
        ([1.0, np.nan, np.inf], True, "holds 1 NaN and 1 Inf among its 3 values"),
        ([1.0, -np.inf], False, "holds 1 Inf among its 2 values"),
        ([-np.inf, np.inf], True, "holds 2 Inf"),
        ([1.0, -np.inf], True, None),
        ([1.0, 2.0], False, None),
    ],
)
def test_weights_must_be_finite_but_masks_may_be_minus_inf(values, mask, said):
    array = np.array(values, np.float32)
    if said is None:
        refuse_non_finite("w", array, where="net", mask=mask)
        return
    with pytest.raises(SourceError, match=f"net: weight 'w' {said}"):
        refuse_non_finite("w", array, where="net", mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_modules_parameters_and_buffers_are_looked_at(dtype):
    module = net().to(dtype)
    module.register_buffer("mask", torch.full((2, 2), -torch.inf, dtype=dtype))
    refuse_non_finite_state(module, "net")
    module[1].running_var[2] = torch.nan
    with pytest.raises(SourceError, match=r"weight '1\.running_var' holds 1 NaN"):
        refuse_non_finite_state(module, "net")
