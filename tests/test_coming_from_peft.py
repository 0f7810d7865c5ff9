"""docs/coming-from-peft.md, what PEFT's own tests ask: every row of the table is run on PEFT and here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_oft import (
    OFTConfig,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)

peft = pytest.importorskip("peft", "0.21.2")

PAGE = Path(__file__).parents[1] / "docs" / "coming-from-peft.md"
X = torch.arange(90.0).view(9, 10) / 90
KEY = "base_model.model.lin0.oft_R.weight"
CHECKS: dict[str, Callable[[Path], None]] = {}

# Both libraries announce much of what the table is about; what it says of a warning is checked by pytest.warns.
pytestmark = pytest.mark.filterwarnings("ignore")


def row(asked: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """The row of the table that a check holds true."""

    def register(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS[asked] = check
        return check

    return register


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lin1(self.lin0(x).relu())
        return output


def fields(options: dict[str, Any]) -> dict[str, Any]:
    return {"target_modules": ["lin0"], "oft_block_size": 2, "init_weights": False, **options}


def theirs(model: nn.Module | None = None, **options: Any) -> Any:
    return peft.get_peft_model(model or Net(), peft.OFTConfig(**fields(options)))


def ours(model: nn.Module | None = None, name: str = "default", **options: Any) -> Any:
    adapted = model or Net()
    inject(adapted, OFTConfig(**fields(options)), name)
    return adapted


def two_of_theirs(**options: Any) -> Any:
    model = theirs(**options)
    model.add_adapter("second", peft.OFTConfig(**fields(options)))
    return model


def two_of_ours(**options: Any) -> Any:
    return ours(ours(**options), "second", **options)


def generators(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "oft_R" in name]


def written(directory: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], **options: Any) -> Path:
    """A directory that PEFT wrote, its tensors edited."""
    theirs(**options).save_pretrained(directory)
    file = directory / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file, {"format": "pt"})
    return directory


def base_output() -> Tensor:
    return Net()(X)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=True)).eval()


@row("generators in the base's 16 bits")
def precision(tmp: Path) -> None:
    in_half = peft.get_peft_model(Net().half(), peft.OFTConfig(**fields({})), autocast_adapter_dtype=False)
    assert {p.dtype for p in (*generators(in_half), *generators(theirs().half()))} == {torch.float16}
    file = written(tmp, lambda tensors: {key: value.half() for key, value in tensors.items()})
    loaded = Net().bfloat16()
    load_adapter(loaded, file)
    models = ours(Net().half()), ours().half(), loaded
    assert {p.dtype for model in models for p in generators(model)} == {torch.float32}


@row("an inactive adapter that trains")
def inactive(tmp: Path) -> None:
    model = two_of_theirs()
    model.set_requires_grad("second", True)
    assert [p.requires_grad for p in generators(model)] == [True, True]
    with pytest.raises(ValueError, match="only active adapters train"):
        set_adapter(two_of_ours(), "default", trainable="second")


@row("an active adapter that does not train")
def frozen(tmp: Path) -> None:
    model = theirs()
    model.set_adapter("default", inference_mode=True)
    assert not generators(model)[0].requires_grad
    mine = two_of_ours()
    set_adapter(mine, ["default", "second"], trainable="second")
    assert [p.requires_grad for p in generators(mine)] == [False, True]


@row("an adapter that was loaded")
def loaded(tmp: Path) -> None:
    file = written(tmp, dict)
    model = peft.PeftModel.from_pretrained(Net().train(), file)
    assert (generators(model)[0].requires_grad, model.training) == (False, False)
    mine = Net().train()
    load_adapter(mine, file)
    assert (generators(mine)[0].requires_grad, mine.training) == (True, True)


@row("two adapters that train biases")
def two_with_biases(tmp: Path) -> None:
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        two_of_theirs(bias="all")
    mine = two_of_ours(bias="all")
    with pytest.raises(ValueError, match=r"both train lin0\.bias"):
        set_adapter(mine, ["default", "second"])


@row("a file with biases for an adapter without")
def biases(tmp: Path) -> None:
    file = written(tmp, dict, bias="all")
    found = peft.set_peft_model_state_dict(theirs(), load_file(file / "adapter_model.safetensors"))
    assert not found.unexpected_keys
    with pytest.raises(ValueError, match=r"only one of them trains lin0\.bias"):
        load_adapter(ours(), file)


@row("disabled, where biases were trained")
def disabled(tmp: Path) -> None:
    model, mine = theirs(bias="all"), ours(bias="all")
    for parameters in (model.named_parameters(), mine.named_parameters()):
        for name, parameter in parameters:
            parameter.data.add_(float(name.endswith("bias")))
    with pytest.warns(UserWarning, match="does not produce the same output as the base"), model.disable_adapter():
        assert not torch.allclose(model(X), base_output(), atol=0.1)
    with disable_adapters(mine):
        assert torch.equal(mine(X), base_output())


@row("disabled, while merged")
def disabled_merged(tmp: Path) -> None:
    model, mine = theirs(), ours()
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base_output(), rtol=0, atol=1e-5)
    assert not model.base_model.model.lin0.merged
    merge(mine)
    with pytest.raises(RuntimeError, match="call unmerge"), disable_adapters(mine):
        pass


@row("merged again, or another adapter on top")
def merged_again(tmp: Path) -> None:
    model, mine = two_of_theirs(), two_of_ours()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert model.base_model.model.lin0.merged_adapters == ["default", "second"]
    merge(mine, "default")
    for names in ("default", "second"):
        with pytest.raises(RuntimeError, match="cannot merge again"):
            merge(mine, names)


@row("unmerged, where nothing is merged")
def unmerged(tmp: Path) -> None:
    with pytest.warns(UserWarning, match="Already unmerged"):
        theirs().unmerge_adapter()
    with pytest.raises(RuntimeError, match="nothing to unmerge"):
        unmerge(ours())


@row("merging a generator of NaN")
def not_finite(tmp: Path) -> None:
    model, mine = theirs(), ours()
    for weight in (*generators(model), *generators(mine)):
        weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    model.merge_adapter()
    assert model.base_model.model.lin0.base_layer.weight.isnan().any()
    with pytest.raises(ValueError, match="generators of lin0 are NaN"):
        merge(mine)


@row("merging a layer whose weight is tied")
def tied(tmp: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["embed_tokens"], "oft_block_size": 8}
    tokens, models = torch.arange(4)[None], [theirs(llama(), **options), ours(llama(), **options)]
    before = [model(tokens).logits for model in models]
    models[0].merge_adapter()
    merge(models[1])
    changes = [float((m(tokens).logits - b).norm() / b.norm()) for m, b in zip(models, before, strict=True)]
    assert changes[0] > 0.1
    assert changes[1] < 1e-6


@row("the last adapter deleted")
def deleted(tmp: Path) -> None:
    model, mine = theirs(), ours()
    model.delete_adapter("default")
    assert type(model.base_model.model.lin0) is not nn.Linear
    delete_adapter(mine, "default")
    assert type(mine.lin0) is nn.Linear
    assert "oft_R" not in dict(mine.lin0.named_children())


@row("the base's parameters after unload")
def unloaded(tmp: Path) -> None:
    mine = ours()
    unload(mine)
    assert not any(parameter.requires_grad for parameter in theirs().unload().parameters())
    assert all(parameter.requires_grad for parameter in mine.parameters())


@row("the same name a second time")
def same_name(tmp: Path) -> None:
    with pytest.raises(ValueError, match="already exists"):
        theirs().add_adapter("default", peft.OFTConfig(**fields({})))
    mine = ours()
    before = generators(mine)[0].clone()
    assert torch.equal(generators(ours(mine))[0], before)
    with pytest.raises(ValueError, match="another configuration"):
        ours(mine, oft_block_size=5)


@row("another adapter for each row of a batch")
def mixed_batch(tmp: Path) -> None:
    model = two_of_theirs()
    with torch.no_grad():
        generators(model)[1].mul_(-1)
        assert torch.equal(model(X), model(X, adapter_names=["second"] * len(X)))
    with pytest.raises(TypeError, match="adapter_names"):
        two_of_ours()(X, adapter_names=["second"] * len(X))


@row("an nn.ModuleDict in modules_to_save")
def module_dict(tmp: Path) -> None:
    def base() -> nn.Module:
        model = Net()
        model.heads = nn.ModuleDict({"a": nn.Linear(2, 2)})
        return model

    with pytest.raises(TypeError, match="ModuleDict"):
        theirs(base(), modules_to_save=["heads"])
    assert ours(base(), modules_to_save=["heads"]).heads["a"].weight.requires_grad


@row("a file without the rotations it should have")
def missing(tmp: Path) -> None:
    file = written(tmp, lambda tensors: {"other": next(iter(tensors.values()))})
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(Net(), file)
    with pytest.raises(ValueError, match="holds no rotation"):
        load_adapter(Net(), file)


@row("a file with a rotation that its configuration does not name")
def unexpected(tmp: Path) -> None:
    file = written(tmp, lambda tensors: {**tensors, KEY.replace("lin0", "lin1"): torch.zeros(10, 1)})
    assert len(generators(peft.PeftModel.from_pretrained(Net(), file))) == 1
    assert load_adapter(Net(), file) == ["lin0", "lin1"]


@row("a file with NaN")
def file_not_finite(tmp: Path) -> None:
    file = written(tmp, lambda tensors: {KEY: tensors[KEY] * torch.nan})
    assert generators(peft.PeftModel.from_pretrained(Net(), file))[0].isnan().all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_adapter(Net(), file)


@row("a pickle, `safe_serialization=False`")
def pickled(tmp: Path) -> None:
    theirs().save_pretrained(tmp, safe_serialization=False)
    peft.PeftModel.from_pretrained(Net(), tmp)
    with pytest.raises(ValueError, match="may run code"):
        load_adapter(Net(), tmp)


@row("where an adapter of another name is written")
def directories(tmp: Path) -> None:
    two_of_theirs().save_pretrained(tmp / "theirs")
    save_adapter(two_of_ours(), tmp / "ours", "second")
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in (tmp / "theirs" / "second").iterdir()} == names
    assert {file.name for file in (tmp / "ours").iterdir()} == names | {"README.md"}
    assert load_adapter(Net(), tmp / "theirs", "second") == ["lin0"]


@row("an adapted embedding's own weight")
def embedding(tmp: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["embed_tokens"], "oft_block_size": 8}
    theirs(llama(), **options).save_pretrained(tmp / "theirs")
    save_adapter(ours(llama(), **options), tmp / "ours")
    stored = [
        any("base_layer" in k for k in load_file(tmp / d / "adapter_model.safetensors")) for d in ("theirs", "ours")
    ]
    assert stored == [True, False]
    assert load_adapter(llama(), tmp / "theirs") == ["model.embed_tokens"]


@row("new values for an adapter in place")
def in_place(tmp: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    written(tmp / "theirs", dict)
    with pytest.raises(ValueError, match="only supports LORA"):
        hotswap_adapter(theirs(), str(tmp / "theirs"), adapter_name="default")
    source, mine = ours(), ours()
    generators(source)[0].data.mul_(2)
    save_adapter(source, tmp / "ours")
    load_adapter(mine, tmp / "ours")
    assert torch.equal(mine(X), source(X))


@row("`exclude_modules` that match nothing")
def excluded(tmp: Path) -> None:
    with pytest.warns(UserWarning, match="no modules were excluded"):
        theirs(exclude_modules=["absent"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(exclude_modules=["absent"])


@row("a configuration that is changed later")
def configuration(tmp: Path) -> None:
    peft.OFTConfig().bias = "all"
    with pytest.raises(AttributeError):
        OFTConfig().bias = "all"  # type: ignore[misc]


@row("an id of the hub")
def hub(tmp: Path) -> None:
    assert callable(peft.PeftModel.push_to_hub)  # a download is not tried here
    with pytest.raises(ValueError, match="give an adapter directory"):
        load_adapter(Net(), "someone/adapter")


@row("names in the state dict")
def names(tmp: Path) -> None:
    assert "base_model.model.lin0.base_layer.weight" in theirs().state_dict()
    assert set(Net().state_dict()) < set(ours().state_dict())


@pytest.mark.parametrize("asked", CHECKS)
def test_both_libraries_do_what_the_page_says(asked: str, tmp_path: Path) -> None:
    CHECKS[asked](tmp_path)


def test_the_page_lists_what_is_checked() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## What PEFT's own tests ask")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", table, re.MULTILINE)
    assert rows == ["asked", *CHECKS]
