"""The device that the arithmetic visits."""

import pytest
import torch

from weightsmith import Memory, apply
from weightsmith.core import device
from weightsmith.core.errors import InputError
from weightsmith.lab import models
from weightsmith.merge import linear


@pytest.mark.parametrize("name", ["cuda:77", "nonsense", "meta:-3:x"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(InputError, match=f"device = {name}") as caught, device.on(name):
        pass
    assert "`--device`" in str(caught.value)
    assert device.current() == "cpu"


def test_a_method_works_on_the_device_it_was_applied_on():
    w = [Memory({"w": torch.ones(4, 4)}), Memory({"w": torch.zeros(4, 4)})]
    with device.on("meta"):
        view = apply(linear, w)
    assert view.device == "meta"
    assert view._lift(torch.ones(2, dtype=torch.bfloat16)).device.type == "meta"
    assert apply(linear, w).device == "cpu"


def test_a_live_model_moves_to_the_device(tmp_path):
    import weightsmith
    from weightsmith.core.calibrate import live

    models.tiny_llama(tmp_path / "m")
    with device.on("meta"):
        assert {p.device.type for p in live(weightsmith.open(tmp_path / "m")).parameters()} == {"meta"}


def test_the_command_line_takes_a_device(tmp_path, capsys):
    from weightsmith.cli import main

    models.tiny_llama(tmp_path / "m")
    inputs = [str(tmp_path / "m")] * 2
    with pytest.raises(SystemExit) as left:
        main(["merge", "linear", *inputs, "-o", str(tmp_path / "out"), "--device", "cuda:77", "-q"])
    assert left.value.code == 2
    assert "device = cuda:77" in capsys.readouterr().err
    main(["merge", "linear", *inputs, "-o", str(tmp_path / "out"), "--device", "cpu", "-q"])
    assert (tmp_path / "out" / "model.safetensors").exists()
