"""Wrong YAML keys and values, and wrong command lines."""

from __future__ import annotations

from typing import Any

from bad_inputs.table import Bench, Mistake

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


def _yaml(name: str, key: str, value: Any, where: str, what: str, remedy: str, varies: bool = False) -> Mistake:
    def make(bench: Bench) -> None:
        bench.command("fit", "--config", bench.yaml({key: value}))

    return Mistake(name, "YAML", make, 2, where, what, remedy, varies)


def _text(name: str, content: str | bytes, where: str, what: str, remedy: str) -> Mistake:
    def make(bench: Bench) -> None:
        bench.command("fit", "--config", bench.text("config.yaml", content))

    return Mistake(name, "YAML", make, 2, where, what, remedy)


def _command(name: str, arguments: str, where: str, what: str, remedy: str) -> Mistake:
    def make(bench: Bench) -> None:
        bench.command(*arguments.replace("DIR", str(bench.directory)).split())

    return Mistake(name, "command", make, 2, where, what, remedy)


def _taken(bench: Bench) -> None:
    bench.text("something", "")
    bench.command("merge", "--base", "x", "--adapter", "y", "--output", bench.directory)


YAMLS = [
    _yaml("a field of another library's", "oft.coft_epsilon", 1e-4, "oft.coft_epsilon", "unknown key", "did you mean 'oft.coft' or 'oft.eps'?"),
    _yaml("a mistyped field", "oft.target_module", "all-linear", "oft.target_module", "unknown key", "did you mean 'oft.target_modules'?"),
    _yaml("a mistyped block", "otf.r", 3, "otf.r", "unknown key", "did you mean 'oft'?"),
    _yaml("a word for a number", "oft.oft_block_size", "big", "oft.oft_block_size", "got 'big'", "expected a whole number"),
    _yaml("a number for a name", "oft.target_modules", 3, "oft.target_modules", "got '3'", "expected a string"),
    _yaml("a word for a switch", "oft.enabled", "perhaps", "oft.enabled", "got 'perhaps'", "expected true or false"),
    _yaml("a mistyped choice", "oft.keep_base", "alway", "oft.keep_base", "'alway' is not a valid choice", "did you mean 'always'?"),
    _yaml("two sizes", "oft.r", 4, "r=4 and oft_block_size=16", "exclude each other", "give one of them"),
    _yaml("a value for a block", "oft", 3, "oft", "got 3", "expected a mapping of options"),
    _yaml("a target that is not there", "oft.target_modules", ["attn"], "target_modules=['attn']", "matches nothing",
        "layers that could be adapted: ", varies=True),
    _yaml("a part that is not there", "oft.module", "modle", "oft.module='modle'", "has no such part", "did you mean 'model'?"),
    _yaml("an adapter that is not there", "oft.pretrained_adapter", "runs/adaptor", "runs/adaptor", "no such directory",
        "give the one that holds adapter_config.json"),
    _yaml("a mistyped option of the Trainer", "trainer.max_epoch", 3, "trainer.max_epoch", "unknown key", "did you mean 'trainer.max_epochs'?"),
    _yaml("a word for a number of epochs", "trainer.max_epochs", "three", "trainer.max_epochs", "got 'three'", "expected a whole number"),
    _yaml("a mistyped callback", "trainer.callbacks", [{"class_path": "EarlyStoping"}], "trainer.callbacks", "no class 'EarlyStoping'",
        "did you mean 'EarlyStopping'?"),
    _yaml("a mistyped model", "model.class_path", "ImageClasification", "model", "no class 'ImageClasification'", "did you mean 'ImageClassification'?"),
    _yaml("a mistyped argument of the model", "model.init_args.pretraned", "x", "model.init_args.pretraned", "unknown key", "did you mean 'pretrained'?"),
    _yaml("an argument outside init_args", "model.pretrained", "x", "model.pretrained", "unknown key", "did you mean 'init_args.pretrained'?"),
    _yaml("a base that is not there", "model.init_args.pretrained", "no/such/folder", "no/such/folder", "no such folder",
        "pretrained is one written by save_pretrained, or a hub id"),
    _yaml("a mistyped optimizer", "model.init_args.optimizer.class_path", "torch.optim.AdamV", "model.init_args.optimizer", "AdamV",
        "did you mean 'Adam'"),
    _yaml("a mistyped argument of the optimizer", "model.init_args.optimizer.init_args.lrr", 3, "optimizer.init_args.lrr", "unknown key",
        "did you mean 'lr'?"),
    _yaml("a mistyped data module", "data.class_path", "DigitsModule", "data", "no class 'DigitsModule'", "did you mean 'DigitsDataModule'?"),
    _yaml("a file that includes another", "config", "other.yaml", "config.yaml", "a file cannot include another", "give each of them with --config FILE"),
    _text("no YAML", "a: [1,", "config.yaml", "not valid YAML", "at line"),
    _text("no mapping", "words", "config.yaml", "not a mapping", "of keys to values"),
    _text("no text", b"oft: \xff\xfe", "config.yaml", "no UTF-8 text at byte 5", "save it as UTF-8"),
    _text("aliases of aliases", BOMB, "config.yaml", "more than 100,000 values once its aliases", "use fewer"),
    _text("brackets without end", "a: " + "[" * 20_000, "config.yaml", "nested too deeply", "a configuration has a handful of levels"),
    _text("a weight file in its place", "#" * 300_000, "config.yaml", "larger than 256 KiB", "give the right file"),
]  # fmt: skip
COMMANDS = [
    _command("a mistyped command", "fitt --config x.yaml", "'fitt'", "unknown command", "did you mean 'fit'?"),
    _command("an unknown command", "zzz", "'zzz'", "unknown command", "one of fit, validate, test, predict, merge, export, info"),
    _command("an option before the command", "--config x.yaml fit", "--config", "options come after the command", "lightning-oft fit --config"),
    _command("nothing to fit", "fit", "fit", "missing model", "--config FILE"),
    _command("a configuration that is not there", "fit --config no/such.yaml", "--config", "no file", "give the path of a YAML file"),
    _command("a Trainer's option without its name", "fit --max_epochs 3", "max_epochs", "unknown key", "did you mean 'trainer.max_epochs'?"),
    _command("a value without an option", "fit three", "'three'", "unexpected argument", "as in --trainer.max_epochs 3"),
    _command("info: nowhere", "info no/such/place", "'no/such/place'", "no file or directory", "give an adapter directory or a .ckpt file"),
    _command("info: a mistyped option", "info x --layer-s", "'--layer-s'", "unknown option", "did you mean '--layers'?"),
    _command("export: a checkpoint that is not there", "export --checkpoint no.ckpt --output DIR/x", "no.ckpt", "no such checkpoint file",
        "give one that ModelCheckpoint wrote"),
    _command("merge: no base", "merge --adapter x --output y", "merge", "the following arguments are required", "--base"),
    Mistake("merge: a directory that is taken", "command", _taken, 2, "merge", "is there already and not empty", "--overwrite replaces it"),
]  # fmt: skip
