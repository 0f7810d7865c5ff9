"""Makes examples/bases/docs-llama: a small Llama pre-trained on the prose in the docstrings of Python and three packages.

    python examples/bases/make_docs_llama.py

The text is what the running Python, torch, numpy and scikit-learn say about themselves (licences: PSF-2.0 and
BSD-3-Clause), without the paragraphs of examples/text/docs-test.txt, which are one in twenty-five of it and stay fixed.
One thread, five minutes. What it printed for the files in the repository:

    8951 paragraphs, 1524380 characters, 543640 tokens
    perplexity of docs-test.txt 23.3
"""

import ast
import re
from contextlib import suppress
from hashlib import sha1
from importlib.util import find_spec
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS, BATCH, LENGTH, LR, VOCABULARY = 2000, 4, 256, 4e-3, 1024
HERE = Path(__file__).parent
FOLDER, TEST = HERE / "docs-llama", HERE.parent / "text" / "docs-test.txt"
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=LENGTH, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
SPECIAL = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role.capitalize() + ':' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% else %}{{ ' ' + m.content }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'()\"-]{79,}\.")  # a paragraph of sentences: no tables, code or signatures


def docstrings(folder: Path) -> list[str]:
    """Every docstring below a folder, but for tests and other people's packages."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        if not {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(path.relative_to(folder).parts):
            with suppress(SyntaxError):  # a file for a newer Python
                nodes = ast.walk(ast.parse(path.read_bytes()))
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                found += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return found


def paragraphs() -> list[str]:
    """The paragraphs of prose, each once and on one line, without marks of reStructuredText."""
    texts = list(topics.topics.values()) + docstrings(Path(ast.__file__).parent)
    for name in ("torch", "numpy", "sklearn"):
        texts += docstrings(Path(str(find_spec(name).origin)).parent)
    blocks = [" ".join(b.split()) for text in texts for b in re.split(r"\n\s*\n", re.sub(r"[`*]", "", text))]
    return [block for block in dict.fromkeys(blocks) if PROSE.fullmatch(block) and "-----" not in block]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL.values())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    start = SPECIAL["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=LENGTH, padding_side="right", chat_template=CHAT, **SPECIAL
    )


def perplexity(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """Of each token given those before it in its own paragraph."""
    with torch.no_grad():
        losses = [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows]
    counts = torch.tensor([len(row) - 1 for row in rows])
    return float(((torch.stack(losses) * counts).sum() / counts.sum()).exp())


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums in another order round differently: one thread makes the same file everywhere
    texts = paragraphs()
    if not TEST.exists():
        held_out = [text for text in texts if sha1(text.encode()).digest()[0] % 25 == 0 and len(text) < 500]
        TEST.write_text("\n".join(held_out) + "\n", encoding="utf-8")
    held_out = TEST.read_text(encoding="utf-8").splitlines()
    texts = sorted(set(texts) - set(held_out))
    tokenizer = make_tokenizer(texts)
    encoded = [[*tokenizer(text).input_ids, 1] for text in texts]
    order = torch.randperm(len(encoded)).tolist()
    ids = torch.tensor([token for index in order for token in encoded[index]])
    print(f"{len(texts)} paragraphs, {sum(map(len, texts))} characters, {len(ids)} tokens", flush=True)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        batch = torch.stack([ids[i : i + LENGTH] for i in torch.randint(len(ids) - LENGTH, (BATCH,)).tolist()])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(step, f"{loss.item():.3f}", flush=True)
    model.eval()
    model.to(torch.bfloat16).save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    rows = [[*tokenizer(text).input_ids[: LENGTH - 1], 1] for text in held_out]
    print(f"perplexity of docs-test.txt {perplexity(model.float(), rows):.1f}")


if __name__ == "__main__":
    main()
