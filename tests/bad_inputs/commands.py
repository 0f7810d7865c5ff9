"""Wrong YAML keys and values, and wrong command lines."""

from __future__ import annotations

from typing import Any

from bad_inputs.table import Bench, Mistake

from lightning_oft import save_adapter

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


def _exported(target: str, *options: str) -> Any:
    def make(bench: Bench) -> None:
        bench.adapter()
        bench.text("thesis.txt", "")
        place = bench.directory / target if target else bench.directory
        bench.command("export", "--checkpoint", bench.directory / "adapter", "--output", place, *options)

    return make


def _six_terms(bench: Bench) -> None:
    model = bench.adapted(lambda net: net.body.oft_R["default"].weight.data.fill_(0.1))
    save_adapter(model, bench.directory / "adapter")
    place = bench.directory / "x.safetensors"
    bench.command("export", "--format", "onetrainer", "--checkpoint", bench.directory / "adapter", "--output", place)


def _named(bench: Bench) -> None:
    arguments = ("--base", "x", "--adapter", bench.adapter(), "--output", bench.directory / "merged")
    bench.command("merge", *arguments, "--adapter-name", "style")


YAMLS = [
    _yaml("a mistyped field", "oft.target_module", "all-linear", "oft.target_module", "does not accept", "did you mean 'oft.target_modules'?"),
    _yaml("two sizes", "oft.r", 4, "r=4 and oft_block_size=16", "exclude each other", "give one of them"),
    _yaml("an optimizer's option that is another's", "optimizer", {"class_path": "torch.optim.AdamW", "init_args": {"learning_rate": 1}}, "optimizer",
        "Option 'learning_rate' is not accepted", "AdamW takes lr, betas, eps, weight_decay"),
    _yaml("a target that is not there", "oft.target_modules", ["attn"], "target_modules=['attn']", "matches nothing",
        "layers that could be adapted: ", varies=True),
    _yaml("a part that is not there", "oft.module", "modle", "oft.module='modle'", "has no such part", "did you mean 'model'?"),
    _yaml("a base that is not there", "model.init_args.pretrained", "no/such/folder", "no/such/folder", "no such folder",
        "pretrained is one written by save_pretrained, or a hub id"),
    _text("aliases of aliases", BOMB, "config.yaml", "more than 100,000 values once its aliases", "use fewer"),
]  # fmt: skip
COMMANDS = [
    _command("a mistyped command", "fitt --config x.yaml", "'fitt'", "unknown command", "did you mean 'fit'?"),
    _command("an option before the command", "--config x.yaml fit", "--config", "options come after the command", "lightning-oft fit --config"),
    _command("export: a checkpoint that is not there", "export --checkpoint no.ckpt --output DIR/x", "no.ckpt", "no such file or directory",
        "give an adapter directory or a checkpoint"),
    _command("merge: no base", "merge --adapter x --output y", "merge", "the following arguments are required", "--base"),
    Mistake("merge: a name of a directory that says none", "command", _named, 2, "adapter", "its files say no name", "leave 'style' out"),
    Mistake("export: an adapter that is there", "command", _exported("adapter"), 2, "adapter", "holds an adapter already", "--overwrite replaces it"),
    Mistake("export: a directory of something else", "command", _exported("", "--overwrite"), 2, "export", "holds something else than an adapter",
        "give another directory"),
    Mistake("export: a patch without its base", "command", _exported("x.safetensors", "--format", "comfyui"), 2, "export",
        "--format comfyui has no rotations, and is written from the base too", "give --base"),
    Mistake("export: oft_blocks of an adapter of inputs", "command", _exported("x.safetensors", "--format", "oft_blocks"), 2, "it rotates inputs",
        "no rotation of outputs does the same", "train with side='output'"),
    Mistake("export: OneTrainer's file of an adapter that turns far in six terms", "command", _six_terms, 2, "body",
        "five terms, which is all that OneTrainer computes, are no rotation that far", "train with num_cayley_neumann_terms=5"),
    Mistake("merge: a directory that is taken", "command", _taken, 2, "merge", "is there already and not empty", "--overwrite replaces it"),
]  # fmt: skip
