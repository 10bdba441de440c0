"""Files with code hidden in them are refused, and the code isn't run."""

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint

from dft.checkpoints.resume import find_checkpoint
from dft.config.adapters import AdapterConfig
from dft.config.model import ModelConfig
from dft.errors import UserError
from dft.model.adapters import with_adapters
from dft.model.loading import load_config, load_model
from dft.model.trained import load_trained
from dft.pickles import check_checkpoint, check_model
from examples.make_tiny_model import make_model

CHECKPOINT_FILES = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth"),
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin", "pytorch_model_fsdp.bin"),
    *("global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt", "global_step2/mp_rank_00_model_states.pt"),
    *("global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt", "global_step2/layer_00-model_states.pt"),
    "pytorch_model_fsdp_0/.metadata",
)


class Code:
    """Its pickle makes a directory when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """A directory that isn't there, unless a test has let code run."""
    return tmp_path / "ran"


def hide_code(path: Path, mark: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == ".metadata":
        path.write_bytes(pickle.dumps(Code(mark)))
    else:
        torch.save({"weight": torch.zeros(2), "more": [Code(mark)]}, path)


def test_code_runs_where_nothing_looks_for_it(tmp_path, mark):
    """Without the check, the hidden code would run: the files are what the other tests take them for."""
    hide_code(tmp_path / "optimizer.pt", mark)
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert mark.is_dir()


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_code_in_a_checkpoint_is_named_and_not_run(name, tmp_path, mark):
    hide_code(tmp_path / "checkpoint" / name, mark)
    with pytest.raises(UserError, match=f"{tmp_path / 'checkpoint' / name}: it calls posix.mkdir"):
        check_checkpoint(tmp_path / "checkpoint")
    assert not mark.exists()


def test_a_resumed_run_refuses_code_before_it_is_loaded(make_trainer, tmp_path, mark):
    make_trainer(save_strategy="steps", save_steps=1, max_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    check_checkpoint(checkpoint)
    (checkpoint / "manifest.json").unlink()  # which whoever hides code would write anew
    hide_code(checkpoint / "training_args.bin", mark)  # never loaded
    hide_code(checkpoint / "rng_state.pth", mark)
    trainer = make_trainer(max_steps=2, resume_from_checkpoint=str(checkpoint))
    with pytest.raises(UserError, match="rng_state.pth: it calls posix.mkdir"):
        find_checkpoint(trainer.args)
    with pytest.raises(UserError, match="rng_state.pth: it calls posix.mkdir"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()


def test_what_deepspeed_saves_is_accepted(tmp_path):
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {
        "loss_scaler": loss_scaler.LossScaler(scale=1.0),
        "dynamic": loss_scaler.DynamicLossScaler(2**16, 2.0, 1000, 1.0, 1, False, dtype=torch.float16),
        "zero_stage": ZeroStageEnum.weights,
        "param_slice_mappings": [{"weight": fragment_address(numel=2, start=0)}],
        "shapes": torch.Size([2]),
    }
    torch.save({"optimizer_state_dict": state}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    check_checkpoint(tmp_path)


def test_the_parts_of_a_distributed_checkpoint_are_looked_through(tmp_path, mark):
    parts = tmp_path / "optimizer_0"
    state = {"weight": torch.zeros(2, dtype=torch.bfloat16), "step": 1, "name": "a text of some length " * 20}
    torch_checkpoint.save(state, storage_writer=torch_checkpoint.FileSystemWriter(parts), no_dist=True)
    check_checkpoint(tmp_path)
    with open(parts / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "name")
    code = io.BytesIO()
    torch.save(Code(mark), code)
    with open(parts / place.relative_path, "r+b") as file:  # the object's bytes moved to the end
        place.offset, place.length = file.seek(0, os.SEEK_END), len(code.getvalue())
        file.write(code.getvalue())
    (parts / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=".metadata: it calls posix.mkdir"):
        check_checkpoint(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("latest", ["latest", "latest_universal"])
@pytest.mark.parametrize("name", ["../elsewhere", "..", "/tmp"])
def test_deepspeeds_parts_lie_inside_the_checkpoint(name, latest, tmp_path):
    (tmp_path / latest).write_text(name)
    with pytest.raises(UserError, match=f"{latest} names '{name}'"):
        check_checkpoint(tmp_path)


def test_files_that_cant_be_looked_through_are_refused(tmp_path, mark):
    torch.save(torch.zeros(2), tmp_path / "optimizer.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.zeros(2), tmp_path / "scheduler.pt")
    with zipfile.ZipFile(tmp_path / "scheduler.pt", "a") as archive:
        archive.writestr("scheduler/constants.pkl", b"")  # by which torch takes it for a program
    (tmp_path / "scaler.pt").write_bytes(pickle.dumps(Code(mark)))
    torch.save({"more": Code(mark)}, tmp_path / "rng_state.pth", pickle_protocol=4)
    (tmp_path / ".metadata").write_bytes(b"nothing")
    with pytest.raises(UserError) as caught:
        check_checkpoint(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", ".metadata"):
        assert f"{tmp_path / name}: it can't be looked through" in str(caught.value)
    assert not mark.exists()


@pytest.fixture
def pickled_model(tiny_model, tmp_path) -> Path:
    """A model whose weights are a pickle, as older versions of transformers save it."""
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    (directory / "model.safetensors").unlink()
    torch.save(make_model(600, hidden_size=32, num_layers=2).state_dict(), directory / "pytorch_model.bin")
    return directory


def test_code_in_a_model_is_named_and_not_run(pickled_model, make_trainer, tokenizer, mark):
    settings = ModelConfig(str(pickled_model), torch_dtype="float32")
    args, config = make_trainer().args, load_config(settings)
    load_model(settings, AdapterConfig(), args, config, tokenizer, "sdpa")
    load_trained(pickled_model)
    hide_code(pickled_model / "pytorch_model.bin", mark)
    for load in (
        lambda: load_model(settings, AdapterConfig(), args, config, tokenizer, "sdpa"),
        lambda: load_trained(pickled_model),
    ):
        with pytest.raises(UserError, match="pytorch_model.bin: it calls posix.mkdir"):
            load()
    assert not mark.exists()


def test_code_in_an_adapter_or_its_base_model_is_named_and_not_run(pickled_model, tmp_path, mark):
    peft = pytest.importorskip("peft")
    model = make_model(600, hidden_size=32, num_layers=2)
    adapter = tmp_path / "adapter"
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = str(pickled_model)
    adapted.save_pretrained(adapter)
    check_model(adapter)
    hide_code(pickled_model / "pytorch_model.bin", mark)
    with pytest.raises(UserError, match="pytorch_model.bin: it calls posix.mkdir"):
        load_trained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    hide_code(adapter / "adapter_model.bin", mark)
    settings = AdapterConfig(use_peft=True, adapter=str(adapter))
    for load in (lambda: load_trained(adapter), lambda: with_adapters(adapted.unload(), settings, seed=0)):
        with pytest.raises(UserError, match="^files that may run code(.|\n)*adapter_model.bin: it calls posix.mkdir"):
            load()
    assert not mark.exists()


def test_pickles_that_nothing_loads_are_left_alone(pickled_model, tiny_model, mark):
    hide_code(pickled_model / "pytorch_model.bin", mark)
    shutil.copy(tiny_model / "model.safetensors", pickled_model)
    hide_code(pickled_model / "checkpoint-1" / "optimizer.pt", mark)
    load_trained(pickled_model)
    assert not mark.exists()
