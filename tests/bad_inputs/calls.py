"""Wrong calls and wrong configurations."""

from __future__ import annotations

from typing import Any

import torch
from bad_inputs.table import Bench, Category, Mistake, config
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning
from small import Small, loader, oft, trainer
from torch import nn

from lightning_oft import (
    OFTConfig,
    OFTFinetuning,
    disable_adapters,
    inject,
    load_adapter,
    merge,
    register_layer_type,
    save_adapter,
    set_adapter,
    unmerge,
)
from lightning_oft.codecs import PlainCodec, register_codec
from lightning_oft.formats import AdapterFileError, save_patch
from lightning_oft.layers import LayerType, RotatedWeight


def _call(name: str, make: Any, error: type[Exception], where: str, what: str, remedy: str) -> Mistake:
    return Mistake(name, "call", make, error, where, what, remedy)


def _config(name: str, where: str, what: str, remedy: str, **options: Any) -> Mistake:
    category: Category = "config"
    return Mistake(name, category, lambda bench: OFTConfig(**options), ValueError, where, what, remedy)


def _inside(call: Any) -> Any:
    def make(bench: Bench) -> None:
        model = bench.adapted()
        with disable_adapters(model):
            call(model)

    return make


def _broken(model: nn.Module) -> None:
    model.body.oft_R["default"].weight.data.fill_(float("nan"))  # type: ignore[union-attr, index, operator]


def _two(bench: Bench, **options: Any) -> Any:
    def second(model: nn.Module) -> None:
        inject(model, config(target_modules=["layers.0"], **options), "second")

    return bench.adapted(second, **options)


def _enormous(model: Any) -> None:
    model.half()
    model.body.weight.data.fill_(6e4)
    model.body.oft_R["default"].weight.data.fill_(1.0)


def _normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))


def _tied() -> nn.Module:
    model = nn.ModuleDict({"words": nn.Embedding(11, 8), "head": nn.Linear(8, 11)})
    model["head"].weight = model["words"].weight
    return model


class _Early(Small):
    """Takes its list of parameters before the callback injects any."""

    def __init__(self) -> None:
        super().__init__()
        self.early = list(self.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.early, 0.1)


class _Gan(Small):
    """Its second optimizer is for what lies outside of the part that is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(2, 1)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.SGD(self.critic.parameters(), 0.1)]


class _Unused(Small):
    """Has a layer that its forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)


class _Reading(Small):
    """Uses the weight of its first layer a second time."""

    def forward(self, x: Any) -> Any:
        again = self.net[0](x) @ self.net[0].weight  # type: ignore[index]
        return self.net(again)


class _Elsewhere(nn.Linear):
    """Has a weight and computes with another."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.own = nn.Parameter(torch.ones(8, 8))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.own


class _LowRank(nn.Module):
    """Looks like a linear layer."""

    in_features, out_features = 8, 8

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.ones(8, 2)), nn.Parameter(torch.ones(2, 8))


class _Experts(nn.Module):
    """Holds experts, in 16 or in 8 bits, and does not say how."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4, dtype=dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4, dtype=dtype), requires_grad=False)


def _experts(dtype: torch.dtype) -> Any:
    def make(bench: Bench) -> None:
        inject(bench.watch(nn.ModuleDict({"experts": _Experts(dtype)})), config(target_modules=["experts"]))

    return make


class _Inert(LayerType):
    def rotated_weights(self, layer: nn.Module) -> dict[str, RotatedWeight]:
        return {"": RotatedWeight("down", 8)}


class ModelMixin(nn.Module):
    """Named as the base class of diffusers' models."""

    def fuse_qkv_projections(self) -> None:
        """Would make one layer of several."""


def _fusable() -> Any:
    model = ModelMixin()
    model.to_q = nn.Linear(8, 8)
    inject(model, config(target_modules=["to_q"]))
    return model


def _fit(task: type[Small], **options: Any) -> Any:
    return lambda bench: trainer(bench.directory, oft(**options)).fit(task(), loader(), loader())


def _averaged(bench: Bench) -> None:
    trainer(bench.directory, EMAWeightAveraging(), oft()).fit(Small(), loader(), loader())


def _fit_with(*others: Any, **options: Any) -> Any:
    return lambda bench: trainer(bench.directory, oft(**options), *others).fit(bench.watch(Small()), loader(), loader())


def _started_from(**options: Any) -> Any:
    def make(bench: Bench) -> None:
        model = Small()
        inject(model, config(target_modules=["net.0"]))
        place = save_adapter(model, bench.directory / "adapter")
        callback = OFTFinetuning(pretrained_adapter=str(place), **options)
        model = Small()
        model.net[0].weight.data.mul_(1 if options else 2)  # type: ignore[index, operator, union-attr]
        trainer(bench.directory, callback).fit(bench.watch(model), loader(), loader())

    return make


class _NoVocabulary:
    def save_pretrained(self, directory: Any) -> None:
        raise ValueError("no vocabulary file")


class _Tokenized(Small):
    tokenizer = _NoVocabulary()


def _tokenized(bench: Bench) -> None:
    callback = oft(export_dir=str(bench.directory / "export"))
    trainer(bench.directory, callback).fit(_Tokenized(), loader(), loader())


CALLS = [
    _call("inject: the two arguments the wrong way round", lambda b: inject(config(), b.net()), TypeError,  # type: ignore[arg-type]
        "inject(OFTConfig, Net)", "takes a module and an OFTConfig", "as in inject(model, OFTConfig(r=4))"),
    _call("inject: a mistyped name", lambda b: inject(b.net(), config(target_modules=["bodi"])), ValueError,
        "target_modules=['bodi']", "matches nothing", "layers that could be adapted: body, odd, layers.0, layers.1"),
    _call("inject: a string where a list was meant", lambda b: inject(b.net(), config(target_modules="0")), ValueError,
        "target_modules='0'", "a string is a regular expression for the whole name", "write [0] for a list"),
    _call("inject: a layer that cannot be rotated", lambda b: inject(b.net(), config(target_modules=["norm"])), ValueError,
        "target_modules=['norm']", "norm: a LayerNorm cannot be adapted", "only layers of type"),
    _call("inject: a broken regular expression", lambda b: inject(b.net(), config(target_modules="(body")), ValueError,
        "target_modules='(body'", "is not a regular expression", "mend it, or give a list of names"),
    _call("inject: null targets and an unknown architecture", lambda b: inject(b.net(), config(target_modules=None)), ValueError,
        "target_modules is null", "the model is of no known architecture", "name the modules, or use 'all-linear'"),
    _call("inject: a module to save that is not there", lambda b: inject(b.net(), config(modules_to_save=["heads"])), ValueError,
        "modules_to_save: heads", "matches no module", "the model's own are body, odd, layers, norm"),
    _call("inject: a width that no block divides", lambda b: inject(b.net(), OFTConfig(oft_block_size=2, target_modules=["odd"])),
        ValueError, "odd: fan-in 7", "leaves blocks of size 1", "add it to exclude_modules, or use a block size near a divisor of 7"),
    _call("inject: the same name with another configuration", lambda b: inject(b.adapted(), config(r=2, oft_block_size=None)), ValueError,
        "body: adapter 'default'", "already there with another configuration", "choose another adapter_name"),
    _call("inject: into a merged model", lambda b: inject(b.adapted(merge), config()), RuntimeError,
        "body are merged", "cannot inject an adapter", "call unmerge(model) first"),
    _call("inject: a parametrized weight", lambda b: inject(b.watch(_normed()), config(target_modules=["0"])), ValueError,
        "target_modules=['0']", "its weight is parametrized", "call torch.nn.utils.parametrize.remove_parametrizations first"),
    _call("inject: an embedding that is tied to a head that trains",
        lambda b: inject(b.watch(_tied()), config(target_modules=["words"], modules_to_save=["head"])), ValueError,
        "words", "its weight is also that of head (they are tied)", "leave one of the two out"),
    _call("inject: a layer that computes without its weight", lambda b: inject(b.watch(nn.Sequential(_Elsewhere())), config(target_modules=["0"])),
        ValueError, "0: a _Elsewhere", "does not compute from its weight what a layer of type linear does", "add it to exclude_modules"),
    _call("inject: a look-alike without a weight", lambda b: inject(b.watch(nn.Sequential(_LowRank())), config(target_modules=["0"])),
        ValueError, "0: a _LowRank", "has no parameter `weight` to merge into", "add it to exclude_modules"),
    _call("inject: experts in a layout of their own", _experts(torch.bfloat16), ValueError,
        "selects what cannot be adapted: experts", "nothing says how a _Experts stores its experts", "register_layer_type(_Experts, like=Experts(is_transposed=...))"),
    _call("inject: experts that are packed", _experts(torch.int8), ValueError,
        "experts: its experts are quantized or packed", "selects what cannot be adapted", "load the base without quantization"),
    _call("inject: magnitudes of an embedding", lambda b: inject(b.watch(_tied()), config(target_modules=["words"], magnitude="joint")), ValueError,
        "words: magnitude='joint'", "nothing scales the neurons of Embedding layers", "leave the layers out with exclude_modules, or set magnitude=None"),
    _call("register_layer_type: a type that rotates nothing", lambda b: register_layer_type(_LowRank, like=_Inert()), TypeError,
        "register_layer_type(like=_Inert())", "nothing of it rotates", "give it a mixin, an input_hook, an output_hook or an attach"),
    _call("register_codec: the class itself", lambda b: register_codec(PlainCodec), TypeError,  # type: ignore[arg-type]
        "register_codec(PlainCodec)", "takes an instance of a subclass of Codec", "as in register_codec(PlainCodec())"),
    _call("set_adapter: a name that is not there", lambda b: set_adapter(b.adapted(), "defualt"), ValueError,
        "no adapter 'defualt' here", "there are: ", "default"),
    _call("set_adapter: two that train one head", lambda b: set_adapter(_two(b, modules_to_save=["head"]), ["default", "second"]), ValueError,
        "'default' and 'second'", "both train head.weight", "only one of them can be active"),
    _call("merge: nothing to merge", lambda b: merge(b.net()), ValueError,
        "nothing to merge", "the model has no adapter", "call inject or load_adapter first"),
    _call("merge: twice", lambda b: merge(b.adapted(merge)), RuntimeError,
        "body are merged", "cannot merge again", "call unmerge(model) first"),
    _call("merge: generators that are NaN", lambda b: merge(b.adapted(_broken)), ValueError,
        "generators of body", "are NaN or infinite; nothing was changed", "load an earlier state of the adapter"),
    _call("unmerge: other weights since the merge",
        lambda b: unmerge(b.adapted(lambda model: (merge(model), model.body.weight.data.zero_()))), RuntimeError,
        "cannot unmerge body", "the weights were changed after the merge", "call unload(model) to keep them as the new base"),
    _call("inject: outputs of an attention", lambda b: inject(b.net(), config(target_modules=["attention"], side="output")), ValueError,
        "attention", "side='output' is not for layers of type attention", "rotate the input"),
    _call("inject: both sides of a layer", lambda b: inject(b.adapted(), config(side="output"), "second"), ValueError,
        "body", "another adapter rotates its input, and a layer turns on one side", "or leave the layer out"),
    _call("save_patch: a model whose names nothing says", lambda b: save_patch(b.adapted(), b.directory / "x.safetensors"), AdapterFileError,
        "Net", "nothing says what the names", "give it, such as"),
    _call("save_patch: a merged model", lambda b: save_patch(b.adapted(merge), b.directory / "x.safetensors", "lora_unet_"), RuntimeError,
        "body are merged", "cannot write a patch", "call unmerge(model) first"),
    _call("merge: inside disable_adapters", _inside(merge), RuntimeError,
        "cannot merge", "inside disable_adapters", "leave its context first"),
    _call("merge: weights that are not loaded", lambda b: merge(b.adapted(lambda model: model.to("meta"))), ValueError,
        "the weights of body", "on the meta device, not loaded or offloaded", "load them onto a device first"),
    _call("save_adapter: a model without adapters", lambda b: save_adapter(b.net(), b.directory / "x"), ValueError,
        "no adapter 'default' here", "there are: none", "call inject first"),
    _call("save_adapter: generators that are NaN", lambda b: save_adapter(b.adapted(_broken), b.directory / "x"), ValueError,
        "generators of body", "are NaN or infinite; nothing was written", "load an earlier state of the adapter"),
    _call("load_adapter: into a merged model", lambda b: load_adapter(b.adapted(merge), b.adapter()), RuntimeError,
        "body are merged", "cannot load an adapter", "call unmerge(model) first"),
    _call("fuse_qkv_projections: of a model that is not merged",
        lambda b: b.watch(_fusable()).fuse_qkv_projections(), RuntimeError,
        "ModelMixin", "would make one layer of the base weights, without their rotations", "call merge(model) first"),
    _call("a forward without its input in front", lambda b: b.adapted().body(data=torch.zeros(8)), TypeError,
        "Linear called with ['data']", "pass its input", "as the first argument"),
    _call("OFTFinetuning: a mistyped option", lambda b: OFTFinetuning(block_size=8), TypeError,
        "OFTFinetuning", "has no option 'block_size'", "did you mean 'oft_block_size'?"),
    _call("OFTFinetuning: a learning rate", lambda b: OFTFinetuning(lr=0.1), TypeError,
        "OFTFinetuning", "has no option 'lr'", "the rate is the optimizer's, in configure_optimizers"),
    _call("OFTFinetuning: a whole configuration", lambda b: OFTFinetuning(config=OFTConfig()), TypeError,
        "OFTFinetuning", "takes the fields of an OFTConfig", "OFTFinetuning(**dataclasses.asdict(config))"),
    _call("inject: convolutions only", lambda b: inject(b.watch(nn.Sequential(nn.Conv2d(8, 8, 3))), OFTConfig(oft_block_size=4)), ValueError,
        "target_modules='all-linear'", "matches nothing", "layers that could be adapted: 0, which have to be named in target_modules"),
    _call("OFTFinetuning: a part that is not there", _fit(Small, module="nett"), ValueError,
        "oft.module='nett'", "the LightningModule has no such part", "did you mean 'net'?"),
    _call("OFTFinetuning: behind a callback that averages weights", _averaged, ValueError,
        "EMAWeightAveraging", "stands before OFTFinetuning in Trainer(callbacks=...)", "put OFTFinetuning first"),
    _call("OFTFinetuning: an optimizer over a list from before", _fit(_Early), RuntimeError,
        "the rotations of net.0, net.3", "are in no optimizer and would never train", "build the optimizer in configure_optimizers"),
    _call("OFTFinetuning: an optimizer of what is frozen", _fit(_Gan, module="net", target_modules=["0"], modules_to_save=None), RuntimeError,
        "optimizer 2 of 2 (SGD)", "holds nothing that trains, OFT has frozen critic.weight", "call requires_grad_(True) on what is to train in configure_optimizers"),
    _call("OFTFinetuning: twice the same", _fit_with(oft()), ValueError,
        "two OFTFinetuning callbacks have module=None", "and adapter_name='default'", "or give each layers of its own by module"),
    _call("OFTFinetuning: beside pruning of what it turns", _fit_with(ModelPruning("l1_unstructured")), ValueError,
        "net.0.oft_R.default", "whose zeros a merge fills", "give it other parameters_to_prune"),
    _call("OFTFinetuning: a best that nobody keeps", _fit_with(export_dir="export", export_from="best"), ValueError,
        "export_from='best'", "no ModelCheckpoint keeps a best file", "or set export_from='last'"),
    _call("OFTFinetuning: a tokenizer that cannot be saved", _tokenized, OSError,
        "export_dir: _NoVocabulary", "cannot be saved beside the merged model (no vocabulary file)", "mend it, or set it to None"),
    _call("OFTFinetuning: an adapter of another base", _started_from(), AdapterFileError,
        "adapter: the adapter", "was trained on another base, net.0 differ", "or set ignore_mismatched_base=True"),
    _call("OFTFinetuning: a block size beside a file's", _started_from(oft_block_size=8), ValueError,
        "oft_block_size=8 (the file has 4)", "the file of pretrained_adapter decides", "leave oft_block_size out"),
    _call("OFTFinetuning: a layer that the loss does not reach", _fit(_Unused, target_modules=["net.0", "spare"]), RuntimeError,
        "the rotations of spare", "got no gradient", "add it to exclude_modules"),
    _call("OFTFinetuning: a weight that is read past its layer", _fit(_Reading, target_modules=["net.0"]), RuntimeError,
        "the weight of net.0 is used in _Reading", "a merge would change the model", "call the layer there, or leave it out"),
]  # fmt: skip

CONFIGS = [
    _config("blocks counted twice", "r=4 and oft_block_size=8", "exclude each other", "give one of them", r=4, oft_block_size=8),
    _config("blocks of one", "oft_block_size=1", "a block of size 1 cannot rotate", "use at least 2", oft_block_size=1),
    _config("magnitudes of turned outputs", "side='output'", "rotates what magnitudes would scale", "set magnitude=None, or rotate the input",
        side="output", magnitude="joint"),
    _config("a size in quotation marks", "oft_block_size='32'", "must be", "a whole number or null", oft_block_size="32"),
    _config("a series of one term", "num_cayley_neumann_terms=1", "fewer than 2 terms never leave the identity", "use an even number such as 6",
        num_cayley_neumann_terms=1),
    _config("LoRA's choice of biases", "bias='lora_only'", "must be", "'none' or 'all' or 'oft_only'", bias="lora_only"),
    _config("layer numbers beside a pattern", "layers_to_transform=[0]", "needs target_modules as a list of names",
        "list the names, or put the indices into the regular expression", layers_to_transform=[0], target_modules="all-linear"),
]  # fmt: skip
