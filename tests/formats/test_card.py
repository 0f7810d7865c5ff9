"""The model card beside an adapter."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from bad_inputs.table import Net, config
from huggingface_hub import ModelCard
from torch import nn

from lightning_oft import AdapterState, OFTConfig, inject, save_adapter
from lightning_oft.formats.card import model_card
from lightning_oft.formats.peft import write_peft
from lightning_oft.model.adapter_state import Base, take


def state(name: str | None = "org/base", **options: object) -> AdapterState:
    model = Net()
    inject(model, config(**options))
    return replace(take(model), base=Base("ViTModel", "transformers.models.vit", name))


def card(directory: Path) -> ModelCard:
    return ModelCard((directory / "README.md").read_text(encoding="utf-8"))


def test_a_card_says_base_configuration_metrics_and_how_to_load(tmp_path: Path) -> None:
    place = write_peft(state(max_angle=0.5, modules_to_save=["head"]), tmp_path / "one", {"val": 0.123456789, "acc": 1})
    data, text = card(place).data, card(place).text
    assert (data.base_model, data.library_name, data.tags) == ("org/base", "peft", ["oft", "lightning-oft"])
    assert "| `max_angle` | `0.5` |" in text
    assert "| `acc` | `1` |\n| `val` | `0.123457` |" in text
    assert "head.weight" in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")
    assert 'ViTModel.from_pretrained("org/base")\nmodel = PeftModel.from_pretrained(base, ' in text
    assert 'ViTModel.from_pretrained("org/base")\nload_adapter(base, ' in text
    again = write_peft(state(max_angle=0.5, modules_to_save=["head"]), tmp_path / "two", {"acc": 1, "val": 0.123456789})
    assert (again / "README.md").read_bytes() == (place / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("name", "is_named", "is_on_hub"),
    [
        ("org/base", True, True),
        ("base", True, True),
        ("local/base", True, False),
        ("./base", True, False),
        ("a/b/c", True, False),
        ("/somewhere/base", False, False),
        ("../somewhere/base", False, False),
        ("~/somewhere/base", False, False),
        ("C:\\somewhere\\base", False, False),
        ("file:///somewhere/base", False, False),
        ('base"\n- evil', False, False),
        (None, False, False),
    ],
)
def test_a_base_is_named_where_that_says_nothing_of_the_machine(
    name: str | None, is_named: bool, is_on_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("local/base").mkdir(parents=True)
    text = model_card(state(name), [], {}, "here")
    assert (f"`{name}`" in text) == is_named
    assert ModelCard(text).data.base_model == (name if is_on_hub else None)
    assert "somewhere" not in text
    assert "evil" not in text


def test_a_card_counts_magnitudes() -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    inject(model, OFTConfig(oft_block_size=4, target_modules=["0"], magnitude="joint"))
    assert "12 magnitudes scale what their neurons give." in model_card(take(model), [], {}, "here")


def test_a_card_says_what_peft_cannot_do(tmp_path: Path) -> None:
    for convolution, library in ((nn.Conv2d(8, 8, 3), "lightning-oft"), (nn.Conv2d(8, 8, 1), "peft")):
        model = nn.Sequential(convolution, nn.Conv2d(8, 8, 3))
        inject(model, OFTConfig(oft_block_size=4, target_modules=["0"]))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            save_adapter(model, tmp_path / library)
        text = card(tmp_path / library).text
        assert all(str(one.message)[4:] in text for one in said)
        assert bool(said) == (library != "peft")
        assert ("PeftModel" in text) == (library == "peft")
        assert card(tmp_path / library).data.library_name == library
    assert "# 0.18 or later" in model_card(state(), [], {}, "here")
    assert "# 0.18 or later" not in model_card(state(use_cayley_neumann=False), [], {}, "here")


def test_text_of_a_file_stays_text() -> None:
    text = model_card(state(target_modules="body|`<b>\n# head"), ["no [x](y)\n# head"], {"a|b": 1.0}, "here")
    assert "\n\nNo \\[x](y)" in text
    assert "\n# head" not in text
    assert "| `a\\|b` | `1` |" in text
